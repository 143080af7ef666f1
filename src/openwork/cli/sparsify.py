"""`openwork sparsify`: a pretrained model of transformers made sparse in one shot, with what it knew before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sparsify(
    model: Annotated[
        str,
        typer.Argument(help="A folder of transformers (config.json, safetensors), or a name on the hub.", metavar="MODEL"),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The new folder; it must not exist, or be empty.")],
    method: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt.")] = "wanda",
    density: Annotated[
        float | None, typer.Option(help="Kept share of the pruned weights; 0.5, or the pattern's, if not given.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, 2:4, block4x1, ...")] = "unstructured",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to calibrate on: a UTF-8 file or a folder of .txt; may be given again.", metavar="PATH"),
    ] = None,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text; the last blocks of --text, which then are not calibrated on, if not given.", metavar="PATH"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Blocks to calibrate on.")] = 128,
    length: Annotated[
        int | None, typer.Option(help="Tokens a block; what the model takes, at most 512, if not given.")
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out blocks.")] = 64,
    allocation: Annotated[str, typer.Option(help="Densities of the layers: uniform, owl or global.")] = "uniform",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layer to leave dense, by name or glob; may be given again.", metavar="NAME")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Hold one block in memory at a time; the model is evaluated only on --eval-text."),
    ] = False,
    finetune_steps: Annotated[int, typer.Option(help="Steps of fine-tuning with the mask held.")] = 0,
    lora: Annotated[bool, typer.Option("--lora", help="Fine-tune low-rank adapters, merged under the mask.")] = False,
    rate: Annotated[float | None, typer.Option(help="Learning rate; 1e-4, with --lora 1e-3, if not given.")] = None,
    batch: Annotated[int, typer.Option(help="Blocks at a time.")] = 8,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too, checked by onnxruntime.")] = False,
    kind: Annotated[str, typer.Option(help="causal, masked or encoder; auto follows the config.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto is the files' own.")] = "auto",
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Tensor of the files that may be left unused, by name or glob.", metavar="NAME"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration blocks and the fine-tuning.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run of the same settings that was stopped.")
    ] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Prune a pretrained transformer in one shot and save it: transformers opens the folder, openwork its small file.

    Embeddings and the head stay dense. Causal models are compared by perplexity, masked ones by the likelihood of hidden
    words, encoders by how near their vectors stay and how well texts are found.

    Examples:

      openwork sparsify path/to/model --text calibration.txt -o sparse/

      openwork sparsify path/to/model --method sparsegpt --pattern 2:4 --text calibration.txt --eval-text held.txt -o out/

      openwork sparsify org/name --density 0.3 --allocation owl --text texts/ --stream -o out/

      openwork sparsify path/to/encoder --text texts/ --finetune-steps 200 --lora --onnx -o out/

    A run that is stopped goes on with the same command and --resume. Nothing is written over.
    """
    from rich.console import Console

    from openwork.cli import _sparsify

    recipe = _sparsify.Recipe(
        model=model, method=method, density=density, pattern=pattern, text=tuple(text or ()),
        eval_text=tuple(eval_text or ()), samples=samples, length=length, eval_samples=eval_samples, allocation=allocation,
        exclude=tuple(exclude or ()), stream=stream, finetune_steps=finetune_steps, lora=lora, rate=rate, batch=batch,
        onnx=onnx, kind=kind, dtype=dtype, ignore=tuple(ignore or ()), seed=seed,
    )  # fmt: skip
    console = Console(stderr=json_out)
    try:
        report = _sparsify.run(recipe, Path(out), resume=resume, console=console, quiet=quiet or json_out)
    except KeyboardInterrupt:
        console.print("stopped; the same command with --resume goes on from here")
        raise typer.Exit(130) from None
    if json_out:
        import json

        print(json.dumps(report, indent=1, ensure_ascii=True, allow_nan=False))
        return
    from openwork.cli import _sparsify_page

    _sparsify_page.show(console, report, Path(out))
