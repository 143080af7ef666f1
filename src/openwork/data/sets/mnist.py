"""MNIST and the two sets of its form, Fashion-MNIST and Kuzushiji-MNIST: idx files, grey, 28x28, 10 classes.

Checksums as in TensorFlow Datasets (sha256, size) and in torchvision and the homes (md5).
"""

from __future__ import annotations

from openwork.data import files, idx
from openwork.data.entry import Entry, File, Raw

PARTS = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def read(entry: Entry) -> Raw:
    """Return the set from its four files: images and labels to train on, images and labels to test on."""
    x_train, y_train, x_test, y_test = (idx.read(files.locate(entry, file)) for file in entry.files)
    return Raw(entry.name, (x_train[:, None], y_train), (x_test[:, None], y_test))


def _files(homes: tuple[str, ...], known: tuple[tuple[str, str, int, str | None], ...]) -> tuple[File, ...]:
    return tuple(
        File(name, tuple(home + name for home in homes), sha256, md5, size, content)
        for name, (sha256, md5, size, content) in zip(PARTS, known, strict=True)
    )


MNIST = _files(
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    (
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            9_912_422,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "d53e105ee54ea40749a09fcbcd1e9432",
            28_881,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "9fb629c4189551a2d022fa330f9573f3",
            1_648_877,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ec29112dd5afa0611ce80d1b7f02629c",
            4_542,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
)

FASHION = _files(
    ("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",),
    (
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            26_421_880,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "25c81989df183df01b3e8a0aad5dffbe",
            29_515,
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "bef4ecab320f06d8554ea6380940ec79",
            4_422_102,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "bb300cfdad3c16e7a12a480ee83cd310",
            5_148,
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
)

KUZUSHIJI = _files(
    ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    (
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "bdb82020997e1d708af4cf47b453dcf7",
            18_165_135,
            None,
        ),
        (
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "e144d726b3acfaa3e44228e80efcd344",
            29_497,
            None,
        ),
        (
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            3_041_136,
            None,
        ),
        (
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
            "7320c461ea6c1c855c0b718fb2a4b134",
            5_120,
            None,
        ),
    ),
)

ENTRIES = (
    Entry(
        name="mnist",
        what="handwritten digits, grey",
        shape=(1, 28, 28),
        classes=10,
        sizes=(60_000, 10_000),
        home="http://yann.lecun.com/exdb/mnist/",
        licence="none stated; often quoted as CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, 1998",
        read=read,
        files=MNIST,
    ),
    Entry(
        name="fashion-mnist",
        what="articles of clothing, grey",
        shape=(1, 28, 28),
        classes=10,
        sizes=(60_000, 10_000),
        home="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        citation="Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747",
        read=read,
        files=FASHION,
    ),
    Entry(
        name="kmnist",
        what="cursive Japanese characters, grey",
        shape=(1, 28, 28),
        classes=10,
        sizes=(60_000, 10_000),
        home="https://github.com/rois-codh/kmnist",
        licence="CC BY-SA 4.0",
        citation="Clanuwat, Bober-Irizar, Kitamoto, Lamb, Yamamoto, Ha, Deep Learning for Classical Japanese "
        "Literature, 2018, arXiv:1812.01718; KMNIST Dataset (CODH), from Kuzushiji Dataset (NIJL), "
        "doi:10.20676/00000341",
        read=read,
        files=KUZUSHIJI,
    ),
)
