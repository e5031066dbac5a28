"""Rows E6, E11, E12, E13: data that changed, that are long, that never end, that are broken."""

import itertools
import json
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, processors

from dtcp.pretrain import fingerprint, packing, sources
from dtcp.pretrain import tokenizer as tokenizers
from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.sources import TextFiles, folder, shuffled
from dtcp.pretrain.text_files import DataError, Document
from dtcp.pretrain.tokenizer import Tokenizer
from tests.harness.work import calls_of

BYTES = Tokenizer.Config().build(tokenizer_path="")


def loader(root: Path, *, seq_len: int = 32, tokenizer: Any = BYTES, **options: Any) -> Any:
    config = PackedDocuments.Config(
        **{"dataset": "folder", "dataset_path": str(root), "part": "all", **options}
    )
    return config.build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=seq_len, local_batch_size=2
    )


def take(data: PackedDocuments, count: int) -> list[torch.Tensor]:
    return [batch["input"] for batch, _ in itertools.islice(data, count)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of a few texts and a JSONL."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 300)
    lines = [json.dumps({"text": f"line {i} " * 20, "body": f"{i}" * 90}) for i in range(9)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


# E6: the data of a resumed run.


def test_survive_E6_the_same_data_are_gone_on_with(texts, tmp_path_factory):
    """From another place on the disk, too, and though every file was touched."""
    data = loader(texts)
    expected = take(data, 5)[3:]
    data = loader(texts)
    take(data, 3)
    copy = tmp_path_factory.mktemp("copy")
    for file in texts.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    resumed = loader(copy)
    resumed.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert all(map(torch.equal, take(resumed, 2), expected))


CHANGES = {
    "added": (lambda root: (root / "e.txt").write_text("e"), {}, "added: e.txt"),
    "removed": (lambda root: (root / "a.txt").unlink(), {}, "removed: a.txt"),
    "longer": (lambda root: (root / "a.txt").write_text("a" * 301), {}, "changed: a.txt"),
    "edited": (lambda root: (root / "a.txt").write_text("b" * 300), {}, "changed: a.txt"),
    "line": (
        lambda root: (root / "d.jsonl").write_text('{"text": "x", "body": "y"}\n'),
        {},
        "changed: d.jsonl",
    ),
    "seed": (lambda root: None, {"seed": 1}, "seed was 0 and is 1"),
    "part": (lambda root: None, {"part": "train"}, "part was 'all' and is 'train'"),
    "text_key": (lambda root: None, {"text_key": "body"}, "text_key was 'text' and is 'body'"),
    "seq_len": (lambda root: None, {"seq_len": 64}, r"seq_len\) was 32 and is 64"),
    "invalid": (lambda root: None, {"replace_invalid": True}, "invalid bytes was 'refused'"),
    "dataset": (
        lambda root: None,
        {"dataset": "stdlib"},
        "dataset was 'folder' and is 'stdlib'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_survive_E6_other_data_are_refused_or_accepted_and_said(change, texts, capsys):
    alter, options, said = CHANGES[change]
    data = loader(texts)
    take(data, 3)
    state = data.state_dict()
    alter(texts)
    with pytest.raises(ValueError, match=said):
        loader(texts, **options).load_state_dict(state)
    accepting = loader(texts, **options, accept_changes=True)
    accepting.load_state_dict(state)
    assert accepting.cursor == data.cursor
    assert "changed and accepted" in capsys.readouterr().out


def test_survive_E6_another_tokenizer_is_refused(texts, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("tokenizer") for _ in range(3)]
    for path, words in zip(folders, ("a b", "a b", "b a"), strict=True):
        word_tokenizer(words.split()).save(str(path / "tokenizer.json"))
    first, same, other = (Tokenizer.Config(folder=str(f)).build(tokenizer_path="") for f in folders)
    state = loader(texts, tokenizer=first).state_dict()
    loader(texts, tokenizer=same).load_state_dict(state)
    for changed in (other, BYTES):
        with pytest.raises(ValueError, match="tokenizer was"):
            loader(texts, tokenizer=changed).load_state_dict(state)


def test_survive_E6_many_files_are_one_digest(texts, monkeypatch):
    monkeypatch.setattr("dtcp.pretrain.fingerprint.LISTED", 2)
    state = loader(texts).state_dict()
    assert len(state["fingerprint"]) < 500
    (texts / "a.txt").write_text("z")
    with pytest.raises(ValueError, match="changed: 4 files"):
        loader(texts).load_state_dict(state)


def test_survive_E6_a_fingerprint_of_the_standard_library_costs_little(monkeypatch):
    """Of each file its ends are read, in a few calls: 0.02 s for all of them."""
    data, read = loader(Path(), dataset="stdlib"), []

    def crc32(part, *before):
        read.append(len(part))
        return zlib.crc32(part, *before)

    monkeypatch.setattr(fingerprint, "zlib", SimpleNamespace(crc32=crc32))
    calls = calls_of(data.fingerprint)
    files = len(data.fingerprint()["files"])
    assert files > 100 and len(read) == 2 * files and max(read) <= fingerprint.EDGE
    assert calls < 200 * files


# E11: loops that cannot end.


def word_tokenizer(words: list[str], *, marks: bool = False) -> HubTokenizer:
    """A tokenizer of whole words, as tokenizer.json holds them."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *words])}
    made = HubTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if marks:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return made


def of_folder(made: HubTokenizer, path: Path, **config: Any) -> Tokenizer:
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.Config(folder=str(path)).build(tokenizer_path="")


@pytest.mark.parametrize("infinite", [True, False])
def test_survive_E11_documents_of_one_token_are_an_error(infinite, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("word")
    unmarked = of_folder(word_tokenizer(["word"]), tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"two tokens or more.*got none in 3 documents"):
        next(iter(loader(tmp_path, tokenizer=unmarked, infinite=infinite)))


def test_survive_E11_a_resumed_epoch_may_be_at_its_end(texts):
    """Nothing is left of this one, and the next has everything."""
    data = loader(texts)
    state = data.state_dict() | {"document": 11, "offset": 10**6}
    data.load_state_dict(state)
    assert len(take(data, 2)) == 2


def test_survive_E11_data_of_less_than_a_step_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="takes 2 rows of 32 tokens, got 0"):
        next(iter(loader(tmp_path, infinite=False)))


def test_survive_E11_a_part_without_documents_is_told_before_any_rank_starts(tmp_path):
    (tmp_path / "a.txt").write_text("one document, which is for training")
    config = llama_tiny()
    options = {"dataset": "folder", "dataset_path": str(tmp_path)}
    config.dataloader = PackedDocuments.Config(**options)
    config.validator.dataloader = PackedDocuments.Config(**options, part="validation")
    with pytest.raises(ValueError, match="got none for part=validation in 1 files"):
        config.check()


# E12: documents of any length.


@pytest.mark.parametrize("kind", ["bytes", "marked", "unmarked"])
def test_survive_E12_a_text_in_pieces_has_the_same_tokens(kind, tmp_path, monkeypatch):
    words = ["a", "bc", "def", "\u00e9\u00e9"]
    text = " ".join(words[i * i % 4] for i in range(300))
    tokenizer = BYTES
    if kind != "bytes":
        made = word_tokenizer(words, marks=kind == "marked")
        config = {"bos_token": "<s>", "eos_token": "</s>"} if kind == "marked" else {}
        tokenizer = of_folder(made, tmp_path / "tokenizer", **config)
    whole = tokenizer.encode(text, add_bos=True, add_eos=True)
    for piece in (7, 100) if kind == "bytes" else (64, 100, len(text)):
        monkeypatch.setattr(tokenizers, "PIECE", piece)
        assert [i for ids in tokenizer.pieces(text) for i in ids.tolist()] == whole


@pytest.mark.parametrize("kind", ["bytes", "marked", "unmarked", "added"])
def test_survive_E12_texts_that_are_read_ahead_have_the_tokens_of_each(kind, tmp_path, monkeypatch):
    words = ["a", "bc", "def", "\u00e9\u00e9"]
    texts = [" ".join(words[i * n % 4] for i in range(n)) for n in (3, 1, 40, 0, 9)]
    tokenizer = BYTES
    if kind != "bytes":
        made = word_tokenizer(words, marks=kind == "marked")
        marks = {"bos_token": "<s>", "eos_token": "</s>"}
        if kind == "added":
            made.add_special_tokens(list(marks.values()))
        tokenizer = of_folder(made, tmp_path / "tokenizer", **({} if kind == "unmarked" else marks))
    monkeypatch.setattr(tokenizers, "PIECE", 64)  # one of them is longer
    expected = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    read = [[i for ids in x for i in ids.tolist()] for x in tokenizer.pieces_of(texts)]
    assert read == expected


def test_survive_E12_what_is_read_ahead_changes_no_row(tmp_path, monkeypatch):
    """Rows, where they stand and what is wrong, of documents by themselves and of many at once."""
    words = ["a", "bc", "def"]
    lines = [" ".join(words[i * n % 3] for i in range(n % 11 + 1)) for n in range(300)]
    broken = [json.dumps({"text": line}) for line in lines] + ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(broken))
    tokenizer, read = of_folder(word_tokenizer(words), tmp_path / "tokenizer"), []
    monkeypatch.setattr(sources, "WINDOW", 8)
    source = TextFiles((tmp_path / "a.jsonl",))
    for ahead in (1, 256):
        monkeypatch.setattr(packing, "AHEAD", ahead)
        rows, start, said = [], packing.Cursor(0, 20, 2), ""
        try:
            for row in packing.pack(source, tokenizer, 32, start, infinite=False, name="these"):
                rows.append((row.tokens.tolist(), row.labels.tolist(), row.names, row.next))
        except DataError as error:
            said = str(error)
        read.append((rows, said))
    assert read[0] == read[1] and len(read[0][0]) > 40 and "a.jsonl:301" in read[0][1]


def test_survive_E12_rows_of_a_document_in_pieces_are_those_of_the_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i * i % 26) for i in range(1000)))
    (tmp_path / "b.txt").write_text("short")
    expected = list(itertools.islice(loader(tmp_path), 20))
    monkeypatch.setattr(tokenizers, "PIECE", 11)
    for stop in (0, 7):
        data = loader(tmp_path)
        take(data, stop)
        resumed = loader(tmp_path)
        resumed.load_state_dict(data.state_dict())
        pairs = zip(itertools.islice(resumed, 12), expected[stop:], strict=False)
        for (batch, labels), (whole, whole_labels) in pairs:
            assert torch.equal(batch["input"], whole["input"])
            assert torch.equal(labels, whole_labels)
            assert batch["documents"].lengths == whole["documents"].lengths


def test_survive_E12_a_document_of_20_MB_costs_what_its_rows_cost(tmp_path):
    """Time and memory for 8 rows of it, by the work done: pieces tokenized and bytes held."""
    (tmp_path / "long.txt").write_bytes(b"0123456789 abcdef " * ((20 << 20) // 18))
    tokenizer, encoded = Tokenizer.Config().build(tokenizer_path=""), []
    unmarked = tokenizer._unmarked
    tokenizer._unmarked = lambda text: encoded.append(len(text)) or unmarked(text)
    data = loader(tmp_path, seq_len=1024, tokenizer=tokenizer)
    batches = iter(data)
    next(batches)
    encoded.clear()
    tracemalloc.start()
    for _ in range(8):
        next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # It was 7.6 s a batch: all of the rest was copied. The first piece has 2 M tokens.
    assert not encoded and peak < 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_survive_E12_a_line_of_100_MB_is_linear_in_memory(suffix, tmp_path):
    """From its middle on, and to its end."""
    text = b"0123456789" * 10_000_000
    line = b'{"text": "' + text + b'"}\n' if suffix == "jsonl" else text
    (tmp_path / f"long.{suffix}").write_bytes(line)
    data = loader(tmp_path, seq_len=1 << 16)
    data.load_state_dict(data.state_dict() | {"offset": 50_000_000})
    tracemalloc.start()
    rows = take(data, 400)
    peak = tracemalloc.get_traced_memory()[1] - sum(row.nbytes for row in rows)
    tracemalloc.stop()
    assert rows[0][0, :4].tolist() == [57, 48, 49, 50]  # the mark came first
    assert peak < 6 * len(text)


def test_survive_E12_a_window_holds_a_bounded_text(monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_CHARACTERS", 800)
    held = largest = 0

    def counted():
        nonlocal held, largest
        for i in range(200):
            held += 10 + i % 300
            largest = max(largest, held)
            yield Document("x" * (10 + i % 300), f"{i}")

    given = []
    for document in shuffled(counted(), sources.random.Random(0)):
        held -= len(document.text)
        given.append(document.place)
    assert sorted(given, key=int) == [f"{i}" for i in range(200)] != given
    assert largest <= 800 + 300


# E13: data that cannot be read.

BROKEN_LINES = {
    "int": b'{"text": 5}',
    "null": b'{"text": null}',
    "list": b'{"text": ["a"]}',
    "dict": b'{"text": {"a": 1}}',
    "bool": b'{"text": true}',
    "float": b'{"text": 1.5}',
    "no_key": b'{"body": "a"}',
    "array": b"[1, 2]",
    "string": b'"text"',
    "number": b"17",
    "digits": b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    "cut": b'{"text": "a',
    "two": b'{"text": "a"} {"text": "b"}',
    "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep_dicts": b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "utf8": b'{"text": "a\xff\xfe"}',
    "latin": '{"text": "\u00e9"}'.encode("latin-1"),
    "utf16": '{"text": "a"}'.encode("utf-16"),
    "surrogate": rb'{"text": "\ud83d"}',
    "nul": b"\x00\x00\x00",
    "twice": b'{"text": "a", "text": "b"}',
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_survive_E13_a_broken_line_is_named_by_file_and_line(kind, tmp_path):
    fine = json.dumps({"text": "fine " * 30}).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([fine, fine, BROKEN_LINES[kind], fine]))
    with pytest.raises(DataError, match=r"x\.jsonl:3") as caught:
        take(loader(tmp_path), 20)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    assert "of epoch 0" in str(caught.value)


def test_survive_E13_a_key_counts_again_in_its_own_object_alone(tmp_path):
    inner = '{"meta": {"text": "x", "of": ["text"]}, "text": "one \\"text\\""}'
    (tmp_path / "x.jsonl").write_text(inner)
    source = folder(str(tmp_path), "all", text_key="text")
    assert [document.text for document in source.documents(0)] == ['one "text"']


def test_survive_E13_what_editors_leave_is_read(tmp_path):
    """A mark of the encoding, a blank line, ends of lines as Windows writes them."""
    lines = ["\ufeff" + json.dumps({"text": "one"}), "", json.dumps({"text": "two\u2028"}), "  "]
    (tmp_path / "x.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "y.txt").write_bytes("\ufeffthree\r\nfour".encode())
    read = [
        document.text for document in folder(str(tmp_path), "all", text_key="text").documents(0)
    ]
    assert sorted(read) == ["one", "three\nfour", "two\u2028"]


def test_survive_E13_a_text_that_is_no_utf8_is_named_by_its_byte_or_replaced(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 and more")
    with pytest.raises(DataError, match=r"x\.txt with byte 0xe9 at offset 3"):
        take(loader(tmp_path), 1)
    source = folder(str(tmp_path), "all", text_key="text", replace_invalid=True)
    assert [document.text for document in source.documents(0)] == ["caf\ufffd and more"]


def test_survive_E13_a_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("here")
    source = TextFiles((tmp_path / "x.txt",))
    (tmp_path / "x.txt").unlink()
    with pytest.raises(DataError, match=r"x\.txt \(No such file"):
        list(source.documents(0))


BROKEN_TOKENIZERS = {
    "empty": ("tokenizer.json", b""),
    "cut": ("tokenizer.json", b'{"version": "1.0", "model": {'),
    "other": ("tokenizer.json", b'{"a": 1}'),
    "list": ("tokenizer.json", b"[]"),
    "deep": ("tokenizer.json", b"[" * 100_000 + b"]" * 100_000),
    "binary": ("tokenizer.json", bytes(range(256))),
    "pickle": ("tokenizer.json", b"\x80\x04N."),
    "config": ("tokenizer_config.json", b"{"),
    "config_list": ("tokenizer_config.json", b"[1]"),
    "config_token": ("tokenizer_config.json", b'{"bos_token": 5}'),
    "vocab": ("vocab.json", b"{"),
    "none": ("readme.md", b"nothing here"),
}


@pytest.mark.parametrize("kind", BROKEN_TOKENIZERS)
def test_survive_E13_a_broken_tokenizer_is_named(kind, tmp_path):
    name, content = BROKEN_TOKENIZERS[kind]
    if name == "tokenizer_config.json":
        word_tokenizer(["a"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        Tokenizer.Config(folder=str(tmp_path)).build(tokenizer_path="")
    assert "\n" not in str(caught.value)


def test_survive_E13_a_tokenizer_does_not_cut_documents(tmp_path):
    """Some are stored with the settings of a batch of short texts."""
    made = word_tokenizer(["a"])
    made.enable_truncation(4)
    made.enable_padding(length=8)
    assert len(of_folder(made, tmp_path).encode("a " * 20)) == 20
    assert len(of_folder(made, tmp_path).encode("a")) == 1


def test_survive_E13_a_document_that_cannot_be_tokenized_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("some words")

    class Failing(Tokenizer):
        def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
            raise OverflowError("too many words")

    tokenizer = Failing(Tokenizer.Config(), tokenizer_path="")
    with pytest.raises(DataError, match=r"document 0 of epoch 0 \(.*x\.txt\) \(OverflowError"):
        take(loader(tmp_path, tokenizer=tokenizer), 1)


def test_survive_E13_of_texts_read_ahead_the_one_that_fails_is_named(tmp_path):
    made = HubTokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # which it does not have
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = [json.dumps({"text": "a a" if i != 5 else "a b"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source, tokenizer = TextFiles((tmp_path / "a.jsonl",)), of_folder(made, tmp_path / "tokenizer")
    place = next(n for n, each in enumerate(source.documents(0)) if "b" in each.text)
    rows = packing.pack(source, tokenizer, 1, packing.Cursor(), infinite=False, name="these")
    assert [next(rows).tokens.tolist() for _ in range(place)] == [[0]] * place
    with pytest.raises(DataError, match=rf"document {place} of epoch 0 \(.*a\.jsonl:6\)"):
        next(rows)


def test_survive_E13_a_row_of_a_dataset_is_named(tmp_path, monkeypatch):
    rows = {"text": [["a"], {"text": 3}], "key": [{"body": "a"}], "broken": []}

    class Rows(list):
        def shuffle(self, seed: int) -> list[Any]:
            return self

    def load(name: str, *_: Any, **__: Any) -> Rows:
        if name == "broken":
            raise ConnectionError("no network\nat all")
        return Rows(rows[name])

    monkeypatch.setattr("datasets.load_dataset", load)
    for name, said in (("key", "row 0 of key.*keys=..body"), ("broken", "no network at all")):
        with pytest.raises(DataError, match=said):
            next(iter(sources.HuggingFace(name, None, "train").documents(0)))
    rows["text"] = [{"text": "a"}, {"text": 3}]
    with pytest.raises(DataError, match=r"row 1 of text.*text='3' of type int"):
        list(sources.HuggingFace("text", None, "train").documents(0))


def test_survive_E13_a_cursor_is_what_it_was():
    """Rows say which documents they hold: what a step's error names."""
    source = TextFiles((Path(__file__),))
    row = next(packing.pack(source, BYTES, 64, packing.Cursor(), infinite=False, name="this file"))
    assert row.names == [f"document 0 of epoch 0 ({__file__})"]
    assert row.next == replace(packing.Cursor(), offset=64)
