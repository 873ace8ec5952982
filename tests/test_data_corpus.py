"""The corpus: what is read, how it is split, what is said when it cannot be, and that nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from unigist_jax.data.corpus import load_documents


@pytest.fixture
def folder(tmp_path):
    """Forty text files, twenty JSON rows and twenty Parquet rows, in two folders."""
    (tmp_path / "sub").mkdir()
    for index in range(40):
        (tmp_path / "sub" / f"{index:02d}.txt").write_bytes(f"text {index}\r\n\tü\n\n  end\n".encode())
    rows = [{"text": f"json {index}", "id": index} for index in range(20)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.table({"id": list(range(20)), "text": [f"parquet {index}" for index in range(20)]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    return tmp_path


def texts(source, split, heldout_fraction=0.3, **options):
    return list(load_documents(str(source), split=split, heldout_fraction=heldout_fraction, **options)["text"])


def test_the_standard_library_is_read_whole_and_without_its_tests():
    splits = [load_documents("stdlib", split=split, heldout_fraction=0.1) for split in ("train", "heldout")]
    names = [list(split["name"]) for split in splits]
    assert not set(names[0]) & set(names[1])
    assert len(names[0]) > 5 * len(names[1]) > 0
    documents = dict(zip(names[0] + names[1], list(splits[0]["text"]) + list(splits[1]["text"]), strict=True))
    assert documents["json/decoder.py"].encode() == Path(json.decoder.__file__).read_bytes()
    assert "unittest/case.py" in documents
    assert not {folder for name in documents for folder in name.split("/")} & {"test", "tests", "site-packages"}
    assert names[0] == sorted(names[0])


def test_a_folder_is_read_in_full_and_its_files_byte_for_byte(folder):
    expected = [f"parquet {i}" for i in range(20)] + [f"json {i}" for i in range(20)]
    expected += [f"text {i}\r\n\tü\n\n  end\n" for i in range(40)]
    assert texts(folder, "train", 0.0) == expected
    train, heldout = texts(folder, "train"), texts(folder, "heldout")
    assert sorted(train + heldout) == sorted(expected)
    for kind in ("text", "json", "parquet"):  # rows of one file go to both splits
        assert any(text.startswith(kind) for text in train) and any(text.startswith(kind) for text in heldout)


def test_paths_and_patterns_combine_and_a_file_counts_once(folder):
    source = f"{folder}/b.jsonl, {folder}/sub/0*.txt,{folder}/sub/../sub/03.txt"
    expected = [f"json {i}" for i in range(20)] + [f"text {i}\r\n\tü\n\n  end\n" for i in range(10)]
    assert texts(source, "train", 0.0) == expected


def test_a_pattern_character_in_a_file_name_is_only_a_character(folder):
    (folder / "x[1].jsonl").write_text('{"text": "bracketed"}\n')
    (folder / "x1.jsonl").write_text('{"text": "plain"}\n')
    assert texts(folder / "x[1].jsonl", "train", 0.0) == ["bracketed"]


def test_a_document_stays_on_its_side_when_others_come(folder):
    before = texts(folder, "heldout")
    for index in range(40, 60):
        (folder / "sub" / f"{index:02d}.txt").write_text(f"text {index}")
    after = texts(folder, "heldout")
    assert set(before) < set(after)


def test_documents_without_text_are_left_out_and_max_documents_limits(folder):
    (folder / "c.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "one"}\n{"text": "two"}\n')
    assert texts(folder / "c.jsonl", "train", 0.0) == ["one", "two"]
    everything = texts(folder, "train")
    assert texts(folder, "train", max_documents=7) == everything[:7]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ('{"body": "x", "id": 1}', ".jsonl", r"no column 'text'; its columns are body, id"),
        ('{"text": 3}', ".jsonl", "not strings"),
        ('{"text": ', ".jsonl", "no readable .jsonl rows"),
        ("", ".jsonl", "no readable .jsonl rows"),
        ("not parquet", ".parquet", "no readable .parquet rows"),
        ("", ".txt", "no document with text"),
        ("\udcff", ".txt", "not UTF-8"),
        ("x", ".csv", "suffix '.csv'"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, content, suffix, message):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        texts(path, "train", 0.0)
    assert str(path) in str(error.value)


def test_unusable_arguments_are_refused_with_a_remedy(folder):
    for source in (folder / "absent", folder / "*.nothing"):
        with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
            texts(source, "train")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="name another folder"):
        texts(folder / "empty", "train")
    with pytest.raises(ValueError, match="names no file"):
        texts(" , ", "train")
    with pytest.raises(ValueError, match="use one of 'train', 'heldout'"):
        texts(folder, "test")
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="heldout_fraction"):
            texts(folder, "train", fraction)
    with pytest.raises(ValueError, match="set heldout_fraction above 0"):
        texts(folder, "heldout", 0.0)
    with pytest.raises(ValueError, match="max_documents=-1"):
        texts(folder, "train", max_documents=-1)
    for fraction, advice in ((1e-9, "raise heldout_fraction"), (1 - 1e-9, "lower heldout_fraction")):
        for split in ("train", "heldout"):
            with pytest.raises(ValueError, match=advice):
                texts(folder, split, fraction)


def test_nothing_is_left_on_disk(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    code = "import sys; from unigist_jax.data.corpus import load_documents as load; "
    code += "print(len(load(sys.argv[1], split='train', heldout_fraction=0.0)))"
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "80"
    assert not [path for path in home.rglob("*") if path.is_file()]
