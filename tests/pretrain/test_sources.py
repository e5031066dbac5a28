"""Where documents come from, and which of them are held out."""

import pytest

from dtcp.pretrain.progress import _left_out
from dtcp.pretrain.sources import TextFiles, folder, standard_library


def texts(source, epoch: int = 0) -> list[str]:
    return [document.text for document in source.documents(epoch)]


def test_training_and_validation_share_no_document():
    parts = [set(texts(standard_library(part))) for part in ("train", "validation")]
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_an_epoch_is_an_order_of_the_same_documents():
    source = standard_library("validation")
    first, again, second = (texts(source, epoch) for epoch in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second)


def test_documents_beyond_the_longest_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("short\n\n" + "long " * 20)
    source = TextFiles((tmp_path / "a.txt",), separator="\n\n", longest=50)
    assert texts(source) == ["short"]


def test_a_folder_gives_texts_and_the_lines_of_a_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n{"body": "three"}\n')
    source = folder(str(tmp_path), "all", text_key="body")
    assert sorted(texts(source)) == ["one", "three", "two"]


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_path=/nowhere: no such folder"):
        folder("/nowhere", "all", text_key="text")
    with pytest.raises(ValueError, match="got none in"):
        folder(str(tmp_path), "all", text_key="text")
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2='broken"):
        list(folder(str(tmp_path), "all", text_key="text").documents(0))


def test_links_of_a_data_folder_are_read_once_or_refused(tmp_path):
    """Texts behind a link would be missing, or come twice where both lie in the folder."""
    root, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (root / "v2/a.txt", elsewhere / "b.txt"):
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    (root / "latest").symlink_to(root / "v2")
    (root / "part").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    source = folder(str(root), "all", text_key="text")
    assert [str(file.relative_to(root)) for file in source.files] == ["again/b.txt", "v2/a.txt"]
    (root / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"texts/up, which leads to .*, around "):
        folder(str(root), "all", text_key="text")
    (root / "up").unlink()
    (elsewhere / "sub").mkdir()
    (root / "an").symlink_to(elsewhere / "sub")
    (elsewhere / "sub/c.txt").write_text("c")
    (root / "again").unlink()
    with pytest.raises(ValueError, match=r"texts/part, which leads to .*, around .*sub, whose"):
        folder(str(root), "all", text_key="text")
    (root / "an").unlink()
    (root / "v2/gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"v2/gone.jsonl, a link to .*nowhere: put the file"):
        folder(str(root), "all", text_key="text")


def test_a_run_says_which_files_of_its_data_folder_it_does_not_read(tmp_path):
    for name in ("a.txt", "b.jsonl.gz", "c.TXT", "d.gz", "LICENSE", ".hidden"):
        (tmp_path / name).write_text("a text")
    source = folder(str(tmp_path), "all", text_key="text")
    assert [file.name for file in source.files] == ["a.txt"]
    assert _left_out(source) == ("; files of other kinds are left out: 4 (.TXT, .gz, no suffix)")
    assert not _left_out(standard_library("all"))


def test_hidden_folders_and_texts_are_left_out_and_counted(tmp_path):
    """What git, editors and the hub's client keep in a folder of texts is no text to train on."""
    for name in (
        ".git/hooks/README.md",
        ".cache/a.jsonl",
        "in/.venv/a.py",
        "in/._a.txt",
        "in/a.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a text")
    source = folder(str(tmp_path), "all", text_key="text")
    assert [str(file.relative_to(tmp_path)) for file in source.files] == ["in/a.txt"]
    assert _left_out(source) == "; files of other kinds are left out: 4 (hidden)"
