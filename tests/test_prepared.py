"""launch.prepare_data's rows: what is read is what the sources hold, for any workers, ratios, mixtures and formats."""

import json
import shutil

import numpy as np
import pytest
from chat_tokenizer import END, TURN, write_chat_tokenizer
from tiny_runs import write_corpus

from unigist_jax.config import DataConfig
from unigist_jax.data import Tokenizer, load_or_train_tokenizer, pack_documents
from unigist_jax.data.conversations import encode_conversation
from unigist_jax.data.from_config import heldout_rows, prepared_directories, run_tokenizer, texts, train_data
from unigist_jax.data.prepare import Request, prepare
from unigist_jax.data.prepared import PreparedRows, read_manifest
from unigist_jax.data.sources import Reading, find_parts, read_part
from unigist_jax.layout import GistLayout

LAYOUT = GistLayout(4, 2, 8)
LENGTH = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), longest=100, documents=20)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return load_or_train_tokenizer(tmp_path_factory.mktemp("work"), corpus, 320)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def request_(corpus, saved):
    return Request(corpus, saved, ratio=8, row_length=LENGTH, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def directory(request_, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    prepare(request_, folder)
    return folder


def all_rows(directory, split, layout, tokenizer):
    rows = PreparedRows(directory, split, layout, LENGTH, tokenizer.fingerprint)
    return rows.take(np.arange(len(rows)))


def documents_in(rows, ratio, pad_id):
    """The tokens of each document of packed rows."""
    found = []
    for tokens, starts in zip(rows.tokens, rows.doc_start, strict=True):
        for start in np.unique(starts):
            piece = tokens.reshape(-1, ratio)[starts == start].ravel()
            found.append(tuple(piece[piece != pad_id]))
    return sorted(filter(None, found))


def test_rows_hold_every_document_once_and_say_so(directory, corpus, tokenizer):
    (part,) = find_parts(corpus)
    documents = {name: ids for name, ids, _ in read_part(part, tokenizer, Reading())}
    assert len(documents) == 20
    pieces = [tuple(ids[i : i + LENGTH]) for ids in documents.values() for i in range(0, len(ids), LENGTH)]
    found, manifest = [], read_manifest(directory)
    for split in ("train", "heldout"):
        rows, report = all_rows(directory, split, LAYOUT, tokenizer), manifest["splits"][split]
        mine = documents_in(rows, 4, tokenizer.pad_id)
        found += mine
        tokens = sum(map(len, mine))
        assert (report["rows"], report["pieces"], report["tokens"]) == (len(rows), len(mine), tokens)
        assert report["targets"] == rows.loss_mask.sum() == sum(len(piece) - 1 for piece in mine)
        assert report["padding_share"] == pytest.approx(1 - tokens / rows.tokens.size, abs=1e-6)
        names = [line for file in sorted(directory.glob(f"{split}/*/names.txt")) for line in file.read_text().split()]
        assert sum(report["lengths"].values()) == len(names) == report["documents"]
        numbers = np.load(directory / split / "00000" / "documents.npy")
        for row, number in zip(rows.tokens, numbers[:, 0], strict=True):  # each unit names its document
            assert set(row[:4]) - {tokenizer.pad_id} <= set(documents[names[number]])
    assert sorted(found) == sorted(pieces)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_rows_serve_every_divisor_of_their_ratio(ratio, directory, tokenizer):
    layout = GistLayout(ratio, 0, 0)
    rows = all_rows(directory, "train", layout, tokenizer)
    alike = all_rows(directory, "train", GistLayout(8, 0, 0), tokenizer)
    np.testing.assert_array_equal(rows.tokens, alike.tokens)
    np.testing.assert_array_equal(rows.doc_start * ratio, np.repeat(alike.doc_start * 8, 8 // ratio, axis=1))


def test_workers_and_interruptions_do_not_change_the_rows(request_, directory, corpus, tmp_path, monkeypatch):
    """Parts of a few bytes, so that there are many; some of them lost, as after a crash."""
    monkeypatch.setattr("unigist_jax.data.sources.PART_BYTES", 500)
    calls = []
    one = prepare(request_, tmp_path / "one", progress=lambda *x: calls.append(x))
    assert len(find_parts(corpus)) > 3 and calls[-1][0] == calls[-1][1] == len(find_parts(corpus))
    two = prepare(request_, tmp_path / "two", workers=2)
    assert one == two
    for lost in ("heldout/00001", "train/00002", "heldout/00002"):
        shutil.rmtree(tmp_path / "two" / lost)
    (tmp_path / "two" / "manifest.json").unlink()
    assert prepare(request_, tmp_path / "two") == one
    for file in sorted((tmp_path / "one").rglob("*.npy")):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes(), file


def test_a_full_disk_is_named_and_the_same_request_goes_on(request_, directory, tmp_path, monkeypatch):
    def full(file, array):
        raise OSError(f"{array.size} requested and 0 written")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"train/0+ cannot be written \(.*free some space"),
    ):
        patch.setattr("unigist_jax.data.prepared.np.save", full)
        prepare(request_, tmp_path)
    assert prepare(request_, tmp_path) == read_manifest(directory)


def test_what_the_rows_are_not_packed_for_is_refused(directory, tokenizer, request_):
    for layout, length, fingerprint, said in [
        (GistLayout(3, 0, 0), LENGTH, tokenizer.fingerprint, "packed for ratio 8, which gist.ratio=3 does not divide"),
        (GistLayout(16, 0, 0), LENGTH, tokenizer.fingerprint, "packed for ratio 8, which gist.ratio=16"),
        (LAYOUT, 128, tokenizer.fingerprint, "have 64 raws, not data.row_length=128"),
        (LAYOUT, LENGTH, "0123", f"of the tokenizer {tokenizer.fingerprint}, not of the run's 0123"),
    ]:
        with pytest.raises(ValueError, match=f"{said}.*launch.prepare_data"):
            PreparedRows(directory, "train", layout, length, fingerprint)
    with pytest.raises(ValueError, match=r"another request \(row_length: 64\); choose another --output"):
        prepare(Request(request_.source, request_.tokenizer, 8, 128, 0.3), directory)
    with pytest.raises(ValueError, match="multiple of ratio=8"):
        Request("stdlib", "x", 8, 60, 0.1)


def test_a_file_that_was_cut_off_or_lost_is_refused_before_a_step_asks_for_it(directory, tokenizer, tmp_path):
    rows = shutil.copytree(directory, tmp_path / "rows") / "train"
    file = next(path for path in sorted(rows.glob("*/mask.npy")) if path.stat().st_size > 200)
    file.write_bytes(file.read_bytes()[:130])
    with pytest.raises(ValueError, match=r"mask\.npy has 130 bytes, its rows take \d+ or more; prepare the data again"):
        PreparedRows(tmp_path / "rows", "train", LAYOUT, LENGTH, tokenizer.fingerprint)
    file.unlink()
    with pytest.raises(ValueError, match=r"mask\.npy is missing"):
        PreparedRows(tmp_path / "rows", "train", LAYOUT, LENGTH, tokenizer.fingerprint)


# --- formats ---------------------------------------------------------------------------------------------------------


def read_all(source, tokenizer, **reading):
    return [item for part in find_parts(str(source)) for item in read_part(part, tokenizer, Reading(**reading))]


def decoded(items, tokenizer):
    return sorted(tokenizer.decode(ids) for _, ids, _ in items)


def test_text_of_every_format_is_the_same(tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("unigist_jax.data.sources.PART_BYTES", 100)
    monkeypatch.setattr("unigist_jax.data.sources.HUB_ROWS", 3)
    words = [f"the text of document {index}, {'é' * index}" for index in range(10)]
    rows = datasets.Dataset.from_dict({"text": words, "other": list(range(10))})
    (tmp_path / "hub").mkdir()
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=2)
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    for source in ("rows.jsonl", "rows.parquet", "hf:hub"):
        name = f"hf:{tmp_path / 'hub'}" if source == "hf:hub" else tmp_path / source
        assert len(find_parts(str(name))) > 2
        items = read_all(name, tokenizer)
        assert decoded(items, tokenizer) == sorted(words) and len({name for name, _, _ in items}) == 10


def write_mds(folder, samples):
    """A shard, by its format's description: `input_ids` of any shape, `indices` of any dtype and shape, a fixed int."""
    folder.mkdir()
    bodies = []
    for ids, borders in samples:
        tokens = bytes([1 << 2 | 1]) + np.uint16(len(ids)).tobytes() + np.asarray(ids, np.uint32).tobytes()
        shape = bytes([2 << 2 | 0, len(borders), 2])
        indices = bytes([33]) + shape + np.asarray(borders, np.int32).tobytes()
        sizes = np.array([len(tokens), len(indices)], np.uint32).tobytes()
        bodies.append(sizes + tokens + np.int64(len(ids)).tobytes() + indices)
    ends = np.cumsum([0, *map(len, bodies)]) + 4 + 4 * (len(bodies) + 1)
    header = np.uint32(len(bodies)).tobytes() + ends.astype(np.uint32).tobytes()
    (folder / "shard.00000.mds").write_bytes(header + b"".join(bodies))
    shard = {
        "column_names": ["input_ids", "length", "indices"],
        "column_encodings": ["ndarray:uint32", "int", "ndarray"],
        "column_sizes": [None, 8, None],
        "compression": None, "format": "mds", "samples": len(bodies), "zip_data": None,
        "raw_data": {"basename": "shard.00000.mds", "bytes": int(ends[-1]), "hashes": {}},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))


def test_prolong_samples_split_at_their_borders(tokenizer, tmp_path):
    first, second = np.arange(5, 305), np.arange(7, 57)
    write_mds(tmp_path / "mds", [(first, [(0, 100), (100, 101), (101, 300)]), (second, [(0, 50)])])
    items = read_all(tmp_path / "mds", tokenizer)
    expected = [first[:100], first[101:], second]
    for (_, ids, learned), want in zip(items, expected, strict=True):
        np.testing.assert_array_equal(ids, want)
        assert learned.all()
    (tmp_path / "mds" / "shard.00000.mds").write_bytes(b"\x02\0\0\0" + b"\xff" * 20)
    with pytest.raises(ValueError, match=r"shard.00000.mds ends after 24 of \d+ bytes"):
        read_all(tmp_path / "mds", tokenizer)


def test_unreadable_data_is_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl@0 .*it has the columns txt, none of which is read: input_ids"):
        read_all(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text\n')
    with pytest.raises(ValueError, match=r"a.jsonl is no JSON at byte 14"):
        read_all(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 999]}\n')
    with pytest.raises(ValueError, match="ids reach 999, the tokenizer has 320"):
        read_all(tmp_path / "a.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_parts(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no place"):
        Reading("a", "b", "no place")


# --- conversations ----------------------------------------------------------------------------------------------------


class ChatTokenizer(Tokenizer):
    """A tokenizer of bytes whose template writes `<role>content|` and, ready for an answer, `<assistant>`."""

    vocab_size, pad_id, bos_id, eos_id = 256, 0, 1, 2

    def _encode(self, text):
        return list(text.encode())

    def _piece_bytes(self, index):
        return bytes([index])

    def encode_chat(self, messages):
        turns = [f"<{message['role']}>{message['content'].strip()}|" for message in messages]
        return self.encode("".join(turns) + "<assistant>")


TURNS = [("system", "be brief"), ("user", "one?"), ("assistant", " 1 "), ("user", "two?"), ("assistant", "2, a pair")]


def test_the_loss_is_on_what_the_assistant_says():
    messages = [{"role": role, "content": content} for role, content in TURNS]
    ids, learned = encode_conversation(ChatTokenizer(), messages)
    assert bytes(ids.astype(np.uint8)) == b"<system>be brief|<user>one?|<assistant>1|<user>two?|<assistant>2, a pair|"
    assert bytes(ids[learned].astype(np.uint8)) == b"1|2, a pair|"
    rows = pack_documents([ids], row_length=128, layout=LAYOUT, pad_id=0, loss_masks=[learned])
    assert bytes(rows.tokens[0, 1:][rows.loss_mask[0, :-1]].astype(np.uint8)) == b"1|2, a pair|"
    with pytest.raises(ValueError, match="without an answer"):
        encode_conversation(ChatTokenizer(), messages[:2])


@pytest.mark.parametrize(
    ("row", "reading"),
    [
        ({"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]}, {}),
        ({"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "2"}]}, {}),
        ({"instruction": "two?", "output": "2"}, {}),
        ({"asked": "two", "said": "2"}, {"prompt_column": "asked", "response_column": "said", "prompt": "{}?"}),
    ],
)
def test_every_form_of_conversation_is_read(row, reading, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    ((_, ids, learned),) = read_all(tmp_path / "chat.jsonl", ChatTokenizer(), **reading)
    assert bytes(ids.astype(np.uint8)) == b"<user>two?|<assistant>2|" and learned.sum() == 2


# --- training reads them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "end", "ends"),
    [
        ({"text": "two words"}, END, 1),
        ({"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]}, TURN, 2),
    ],
)
def test_a_tokenizer_without_a_mark_for_padding_learns_the_end_that_it_pads_with(row, end, ends, tmp_path):
    """Llama 3's: texts end with `<|end_of_text|>`, those of Instruct's conversations with `<|eot_id|>`."""
    write_chat_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": end}))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    request = Request(str(tmp_path / "a.jsonl"), str(tmp_path), ratio=4, row_length=256, heldout_fraction=0.0)
    report = prepare(request, tmp_path / "rows")["splits"]["train"]
    tokenizer = Tokenizer.load(tmp_path / "rows")
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = PreparedRows(tmp_path / "rows", "train", LAYOUT, 256, tokenizer.fingerprint).take(np.arange(1))
    targets = rows.tokens[0, 1:][rows.loss_mask[0, :-1]]
    assert (targets == tokenizer.pad_id).sum() == 3
    other = (rows.tokens[0] != tokenizer.pad_id).sum()
    assert (report["documents"], report["targets"], report["tokens"]) == (3, len(targets), other + 3 * ends)


def test_a_mixture_has_its_weights(directory, request_, tokenizer, tmp_path):
    (tmp_path / "second.jsonl").write_text("".join(json.dumps({"text": f"{i} document" * 9}) + "\n" for i in range(40)))
    other = prepare(Request(f"{tmp_path}/second.jsonl", request_.tokenizer, 4, LENGTH, 0.3), tmp_path / "other")
    data = DataConfig(source=f"{directory},{tmp_path / 'other'}", weights="1,3", row_length=LENGTH)
    batches = train_data(data, LAYOUT, tokenizer, batch_size=8, seed=0)
    first = {tuple(row) for row in all_rows(directory, "train", LAYOUT, tokenizer).tokens}
    drawn = [tuple(row) for step in range(30) for row in batches.batch(step)["tokens"]]
    assert other["splits"]["train"]["rows"] > 1
    share = np.mean([row in first for row in drawn])
    assert share == pytest.approx(0.25, abs=0.02)
    held = heldout_rows(data, LAYOUT, tokenizer, 6)
    assert 1 < len(held) <= 6
    assert run_tokenizer(tmp_path / "work", data).fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tmp_path / "work").fingerprint == tokenizer.fingerprint
    assert all("document" in text for text in texts(data, tokenizer, "heldout", 2)[:1])


def test_unusable_mixtures_are_refused(directory, corpus, tokenizer):
    with pytest.raises(ValueError, match="mixes prepared rows with"):
        prepared_directories(DataConfig(source=f"{directory},{corpus}"))
    with pytest.raises(ValueError, match=r"data.weights='1' are for prepared directories"):
        prepared_directories(DataConfig(source=corpus, weights="1"))
    for weights in ("1,2", "x", "0"):
        data = DataConfig(source=str(directory), weights=weights, row_length=LENGTH)
        with pytest.raises(ValueError, match=f"data.weights='{weights}' must be 1 numbers"):
            train_data(data, LAYOUT, tokenizer, batch_size=8, seed=0)
