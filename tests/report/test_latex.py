"""The LaTeX export, read by a strict tokenizer: only known commands, balanced groups, no bare special character."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.report.latex import escape, latex_tables
from tests.report.conftest import HOSTILE, hostile, make

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}$&#%_^~\n]|[^\\{}$&#%_^~\n]+", re.S)
_WORDS = r"""
\begin \end \centering \small \caption \label \toprule \midrule \bottomrule \textbf \texttt \textless \textgreater \textbar
\textbackslash \textasciitilde \textasciicircum \char \ldots \linewidth \i \j \ss \ae \AE \o \O \l \L \c \r \H \v \u
\\ \, \% \# \& \_ \{ \} \$ \' \" \^ \~ \= \. \`
"""
_MATH = r"""
\pm \times \to \leq \geq \cdot \infty \mu \alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \nu \xi
\pi \rho \sigma \tau \upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi \Omega
- p ^ 2 3
"""
COMMANDS, MATH = set(_WORDS.split()), set(_MATH.split())


def check(text: str) -> list[str]:
    """Return the tokens of a LaTeX text; fail on whatever an engine would stumble over."""
    assert text.isascii()
    lines = [line for line in text.split("\n") if not line.startswith("% ")]
    tokens = TOKEN.findall("\n".join(lines))
    assert "".join(tokens) == "\n".join(lines)
    depth, math = 0, False
    for token in tokens:
        if token == "$":
            math = not math
        elif math:
            assert token in MATH, token
        elif token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            assert depth >= 0
        elif token.startswith("\\"):
            assert token in COMMANDS, token
        else:
            assert token not in ("#", "%", "_", "^"), token
    assert depth == 0
    assert not math
    return tokens


def cells(text: str) -> list[list[int]]:
    """Return for each tabular the number of cells of its rows, the layout's first."""
    found = []
    for layout, body in re.findall(r"\\begin\{tabular\}\{((?:[lr]|p\{[^}]*\})*)\}(.*?)\\end\{tabular\}", text, re.S):
        wide = len(re.sub(r"p\{[^}]*\}", "p", layout.replace("{0.42\\linewidth}", "")))
        rows = [row for row in body.split("\n") if row.endswith(r"\\")]
        assert rows
        found.append([wide, *(len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows)])
    return found


@pytest.mark.parametrize("results", [make(kind="study"), make(), hostile(), hostile("compare")])
def test_tables_pass_a_strict_tokenizer_and_every_row_has_all_cells(results):
    text = latex_tables(results)
    check(text)
    assert re.findall(r"\\(begin|end)\{(table|tabular)\}", text) == [
        (side, name)
        for _ in range(text.count(r"\begin{table}"))
        for side, name in [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    ]
    tables = cells(text)
    assert len(tables) == 1 + bool(results["claims"])
    for counts in tables:
        assert len(set(counts)) == 1
    assert len(tables[0]) == len(results["rows"]) + 2


def test_the_numbers_are_those_of_the_results():
    results = make(methods=("rigl",), densities=(0.1,))
    text = latex_tables(results)
    for row in results["rows"]:
        mean, half = row["accuracy"]["mean"], (row["accuracy"]["high"] - row["accuracy"]["low"]) / 2
        assert rf"{100 * mean:.1f} $\pm$ {100 * half:.1f}" in text
    assert r"10~\%" in text
    assert r"$-$" in text


def test_the_best_of_a_density_is_bold():
    text = latex_tables(make(methods=("set", "granet"), densities=(0.1,)))
    assert re.findall(r"\\textbf\{(\w+)\}", text) == ["granet"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & c % d # $e$ {f}", r"a\_b \& c \% d \# \$e\$ \{f\}"),
        ("\\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("^~<>|", r"\textasciicircum{}\textasciitilde{}\textless{}\textgreater{}\textbar{}"),
        ("Kovačević née Müller", r"Kova\v{c}evi\'{c} n\'{e}e M\"{u}ller"),
        ("naïve ñ ç", r"na\"{\i}ve \~{n} \c{c}"),
        ("α λ Ω", r"$\alpha$ $\lambda$ $\Omega$"),
        ("网", r"\texttt{U+7F51}"),
        ("a--b ''", "a-{}-b '{}'"),
        ("–", "--"),
        ("−0.5 ± 1", r"$-$0.5 $\pm$ 1"),
        ("\x1b[31mred\x00\n", r"red\textbackslash{}x00\textbackslash{}n"),
    ],
)
def test_escape(text, expected):
    assert escape(text) == expected


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_passes_the_tokenizer(text):
    made = escape(text)
    assert made.isascii()
    assert "\n" not in made
    tokens = TOKEN.findall(made)
    assert "".join(tokens) == made
    allowed = COMMANDS | MATH
    assert all(token in allowed for token in tokens if token.startswith("\\"))
    assert not any(token in ("#", "%", "&", "_") for token in tokens)
    assert made.count("{") - made.count(r"\{") == made.count("}") - made.count(r"\}")


def test_it_compiles(tmp_path):
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("neither pdflatex nor tectonic is installed")
    body = latex_tables(hostile()) + latex_tables(make(kind="study")) + "\n\n".join(map(escape, HOSTILE.values()))
    source = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\n\\end{document}\n"
    (tmp_path / "page.tex").write_text(source)
    options = ["-halt-on-error", "-interaction=nonstopmode"] if "pdflatex" in engine else []
    done = subprocess.run([engine, *options, "page.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").exists()
