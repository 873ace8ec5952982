"""The commands: help, bad input, and the way from a corpus to a trained, evaluated, generating model."""

import ast
import json
import re

import pytest
from command_line import ROOT, assert_refused, runner
from tiny_runs import write_corpus

from unigist_jax.checkpoints import load_directory
from unigist_jax.data import Tokenizer
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.model.hf import save_hf

COMMANDS = sorted(
    path.stem
    for path in (ROOT / "launch").glob("*.py")
    if not path.stem.startswith(("bench_", "tune_", "inference_")) and '__name__ == "__main__"' in path.read_text()
)
CONFIG = """
from unigist_jax.config import default_config

def get_config():
    config = default_config()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32",
    )
    config.gist.update(ratio=4, num_sinks=2, window=8)
    config.data.update(source={source!r}, vocab_size=320, row_length=64, heldout_fraction=0.3)
    config.optim.update(peak_lr=1e-2, warmup_steps=2)
    config.train.update(steps=4, batch_size=4, eval_every=4, eval_rows=4, checkpoint_every=4)
    return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return runner(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    source = write_corpus(folder / "corpus", longest=700)
    (folder / "config.py").write_text(CONFIG.format(source=source))
    return folder / "config.py"


@pytest.fixture(scope="module")
def trained(command, config_file, tmp_path_factory):
    """The work directory of a finished run, and what the command said."""
    workdir = tmp_path_factory.mktemp("trained")
    finished = command("train", f"--config={config_file}", f"--workdir={workdir}", "--platform=cpu")
    assert finished.code == 0, finished.err
    return workdir, finished


def own_flags(name):
    """Names of the flags that the command's source defines."""
    nodes = ast.walk(ast.parse((ROOT / "launch" / f"{name}.py").read_text()))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {call.args[0].value for call in calls if call.func.attr.startswith("DEFINE_")}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag(name, command):
    finished = command(name, "--help")
    assert finished.code in (0, 1)
    text = finished.out + finished.err
    named = set(re.findall(r"^ *(?:-\w,)?--(?:\[no\])?(\w+):", text, re.MULTILINE))
    expected = own_flags(name) | {"platform"}
    source = (ROOT / "launch" / f"{name}.py").read_text()
    expected |= {flag for flag in ("workdir", "tensor") if f"define_{flag}" in source}
    assert named >= expected, text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--config.train.stepz=1", ["'stepz'", '"steps"']),
        ("--config.trane.steps=1", ["'trane'"]),
        ("--config.gist.window=6", ["window=6", "ratio=4", "nearest legal window is 8"]),
        ("--config.model.attention_backend=flash", ["'flash'", "choose one of", "'blocked'"]),
        ("--config.data.row_length=30", ["30", "ratio=4", "pad it to 32"]),
        ("--config.optim.warmup_steps=9", ["warmup_steps=9", "below train.steps=4"]),
        ("--config.mesh.data=3", ["batch_size=4", "multiple of", "3"]),
    ],
)
def test_train_refuses_bad_configs(flag, parts, command, config_file, tmp_path):
    finished = command("train", f"--config={config_file}", f"--workdir={tmp_path}/run", "--platform=cpu", flag)
    assert_refused(finished, *parts)
    assert not (tmp_path / "run").exists()


def test_train_refuses_an_empty_corpus(command, config_file, tmp_path):
    (tmp_path / "empty.txt").touch()
    source = tmp_path / "empty.txt"
    flags = f"--config={config_file}", f"--workdir={tmp_path}/run", f"--config.data.source={source}"
    assert_refused(command("train", *flags), str(source), "no document with text", "name files with text")
    flags = *flags[:2], f"--config.data.source={tmp_path}/absent"
    assert_refused(command("train", *flags), f"{tmp_path}/absent", "neither a file nor a folder")


def test_train_refuses_the_work_directory_of_another_run(command, config_file, trained):
    flags = f"--config={config_file}", f"--workdir={trained[0]}", "--config.optim.peak_lr=0.5"
    assert_refused(command("train", *flags), "different run", "optim.peak_lr: 0.01 -> 0.5", "another --workdir")


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [
        ("evaluate", ["--suite=speed"], ["--suite", "'speed'", "perplexity"]),
        ("evaluate", ["--method=magic"], ["--method", "'magic'", "unigist"]),
        ("evaluate", ["--tasks=riddle"], ["--tasks", "'riddle'", "needle"]),
        ("evaluate", ["--suite=helmet"], ["--helmet=", "CATEGORY=FILE", "rag, rerank"]),
        ("evaluate", ["--lengths=1k"], ["--lengths=1k", "whole numbers"]),
        ("evaluate", ["--suite=boundary", "--method=snapkv"], ["snapkv", "no perplexity by token", "--suite=recall"]),
        ("evaluate", ["--method=autocompressors"], ["autocompressors needs a model trained with chunks"]),
        ("evaluate", ["--chunk_size=6"], ["chunk size 6", "ratio=4", "use 4 or 8"]),
        ("evaluate", ["--suite=boundary", "--lengths=50000"], ["no held-out document has 50000 tokens", "shorter"]),
        ("generate", ["--prompt=a", "--chunk_size=3"], ["chunk size 3", "ratio=4", "use 4 or 8"]),
        ("generate", ["--prompt=a", "--method=magic"], ["'magic'", "full", "unigist"]),
        (
            "generate",
            ["--prompt=document", "--capacity=3"],
            ["capacity is 3", "raise the capacity or shorten the prompt"],
        ),
        (
            "evaluate",
            ["--method=unigist_int8"],
            ["--suite=perplexity reads in one pass", "unigist_int8", "boundary, recall"],
        ),
        ("generate", ["--prompt=a", "--tensor=3"], ["'tensor': 3", "needs 3 devices, but there are 1"]),
        ("compress", ["--document=absent.txt", "--output=x"], ["absent.txt"]),
        ("compress", ["--document=/dev/null", "--output=x"], ["/dev/null holds no text"]),
        ("compress", [f"--document={ROOT}/Makefile", f"--output={ROOT}"], [f"{ROOT} is a folder; name a file"]),
        (
            "generate",
            [f"--prompt_file={ROOT}/docs/demo/loss.png"],
            ["loss.png is not UTF-8 text", "convert it to UTF-8"],
        ),
        ("generate", ["--prompt=a", "--stop_token=320"], ["stop token 320", "vocabulary 0 … 319"]),
        ("generate", ["--prompt=a", "--platform=abacus"], ["--platform=abacus: jax finds no such device here"]),
        ("generate", ["--prompt=a", "--top_p=1.5"], ["top_p=1.5", "at most 1"]),
        ("generate", [], ["--prompt or --prompt_file"]),
        ("generate", ["--prompt_file=absent.txt"], ["absent.txt"]),
    ],
)
def test_bad_flags_are_refused(name, flags, parts, command, trained):
    assert_refused(command(name, f"--workdir={trained[0]}", "--platform=cpu", *flags), *parts)


@pytest.mark.parametrize(
    ("body", "flags", "parts"),
    [
        ("add(**{'gist.ratios': 8})", [], ["'ratios=8'", "no config field 'gist.ratios'", "did you mean 'gist.ratio'"]),
        ("add(); add()", [], ["sweep.py, line 2", "two runs are called 'base'"]),
        ("add()", ["--executor=slurm", "--slurm_option=x"], ["--slurm_option=x is no option"]),
        ("add()", ["--gpus=0", "--jobs=2"], ["--jobs=2", "there is 1 GPU"]),
        ("add()", ["--train_flag=x"], ["--train_flag=x is no flag", "--train_flag=--x"]),
        ("add()", ["--status"], ["holds no sweep", "--config and --sweep"]),
    ],
)
def test_sweep_refuses_bad_input_before_anything_runs(body, flags, parts, command, config_file, tmp_path):
    (tmp_path / "sweep.py").write_text(f"def sweep(add):\n    {body}\n")
    files = f"--config={config_file}", f"--sweep={tmp_path}/sweep.py", f"--output={tmp_path}/out"
    assert_refused(command("sweep", *files, *flags), *parts)
    assert not (tmp_path / "out").exists()


def test_sweep_says_what_it_would_run(command, config_file, tmp_path):
    (tmp_path / "sweep.py").write_text(
        "def sweep(add):\n    for ratio in (2, 4):\n        add(**{'gist.ratio': ratio})\n"
    )
    files = f"--config={config_file}", f"--sweep={tmp_path}/sweep.py", f"--output={tmp_path}/out"
    finished = command("sweep", *files, "--dry_run", "--config.train.steps=9")
    assert finished.code == 0 and finished.out.count("python -m launch.train") == 2, finished.err
    assert "--config.train.steps=9 --config.gist.ratio=4" in finished.out
    finished = command("sweep", *files, "--dry_run", "--executor=slurm")
    assert finished.code == 0 and "#SBATCH --array=0-1" in finished.out, finished.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "flags"), [("evaluate", []), ("generate", ["--prompt=a"])])
def test_a_work_directory_without_a_run_is_refused(name, flags, command, tmp_path):
    assert_refused(command(name, f"--workdir={tmp_path}", *flags), str(tmp_path), "holds no run", "launch.train")


# --- the whole way ----------------------------------------------------------------------------------------------------


def strict_json(text):
    """JSON as everyone reads it: NaN is none."""

    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_train_leaves_a_complete_work_directory(trained):
    workdir, finished = trained
    assert {"config.json", "tokenizer.model", "metrics.jsonl", "checkpoints"} <= {p.name for p in workdir.iterdir()}
    lines = [strict_json(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert strict_json((workdir / "config.json").read_text())["model"]["vocab_size"] == 320
    assert re.search(r"step 4: held-out loss \d\.\d+, held-out perplexity", finished.out + finished.err)


def test_evaluate_writes_json_and_plots(command, trained, tmp_path):
    flags = "--method=unigist,full --lengths=512 --chunk_size=64 --documents=2 --records=2 --rows=8 --platform=cpu"
    finished = command("evaluate", f"--workdir={trained[0]}", f"--output={tmp_path}", *flags.split())
    assert finished.code == 0, finished.err
    results = {path.stem: strict_json(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(results) == {"perplexity", "boundary", "recall"}
    assert (tmp_path / "recall.md").read_text().count("| needle | 512 |") == 2
    for name in ("boundary", "recall"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name, result in results.items():
        assert (result["step"], result["ratio"], result["window"]) == (4, 4, 8)
        assert set(result.get("methods", ["unigist", "full"])) == {"unigist", "full"}, name
    assert 1 < results["perplexity"]["methods"]["unigist"]["perplexity"] < 1000
    assert len(results["boundary"]["methods"]["full"]["position"]) == 32  # 511 losses in buckets of 16
    assert "border_jump" in results["boundary"]["methods"]["unigist"]
    for method in ("unigist", "full"):
        recall = results["recall"]["results"][f"needle, 512, {method}"]
        assert recall["samples"] == 2 and recall["cache_bytes"] > 0
        log = tmp_path / "samples" / f"recall,needle,512,{method},ratio=4.jsonl"
        assert [strict_json(line).get("depth") for line in log.read_text().splitlines()] == [None, 0.0, 1.0]
        assert f"recall, needle, 512, {method}: " in finished.out


def test_evaluate_reads_helmet_records_and_goes_on(command, trained, tmp_path):
    record = {"context": "document 1 2 3 " * 9, "question": "which", "answer": "document"}
    files = [tmp_path / f"niah_{task}" / "toy.jsonl" for task in (2, 3)]
    for count, file in zip((3, 2), files, strict=True):
        file.parent.mkdir()
        file.write_text(count * (json.dumps(record) + "\n"))
    flags = "--suite=helmet", *(f"--helmet=recall={file}" for file in files), "--chunk_size=64", "--platform=cpu"
    for shown in ("3/3", "2/2"):
        finished = command("evaluate", f"--workdir={trained[0]}", f"--output={tmp_path}", *flags)
        assert finished.code == 0 and shown in finished.err, finished.err
    results = strict_json((tmp_path / "helmet.json").read_text())["results"]
    assert list(results) == ["recall, niah_2-toy, unigist", "recall, niah_3-toy, unigist"]
    assert all(0 <= of["score"] <= 100 and of["metric"] == "share of answers" for of in results.values())
    for name, count in ("niah_2-toy", 3), ("niah_3-toy", 2):
        log = tmp_path / "samples" / f"helmet,recall,{name},unigist,ratio=4.jsonl"
        assert len(log.read_text().splitlines()) == 1 + count
    assert (tmp_path / "helmet.md").read_text().startswith("| method | synthetic recall | average |")


def test_generate_streams_text_and_tells_the_cache(command, trained):
    flags = "--prompt=document 7", "--max_new_tokens=9", "--chunk_size=4", "--capacity=50", "--platform=cpu"
    finished = command("generate", f"--workdir={trained[0]}", *flags)
    assert finished.code == 0, finished.err
    text, report = finished.out.split("\n[step 4; ")
    assert text.strip()
    assert re.search(r"prompts of \d+ tokens, 9 generated\]", report)
    # 2 layers of keys and values, 2 heads of 8 float32 for every sink, gist (a page) and ring slot (12, in eights)
    per_token = 2 * 2 * 2 * 8 * 4
    held, full = (2 + 64 + 16) * per_token, 256 * per_token
    assert f"{held:,} bytes; full attention would hold {full:,} ({full / held:.2f}x)" in report


def test_a_document_is_compressed_once_and_asked_twice(command, trained, tmp_path):
    """The answers are those of a prompt that holds document and question; the file says what it is not for."""
    text = "document 7\n\n" + " ".join(f"w{i:x}" for i in range(90))
    (tmp_path / "document.txt").write_text(text)
    run, file = f"--workdir={trained[0]}", tmp_path / "document.cache"
    source = f"--document={tmp_path}/document.txt", f"--output={file}", "--chunk_size=32", "--platform=cpu"
    finished = command("compress", run, *source)
    assert finished.code == 0, finished.err
    said = re.search(r"read (\d+) tokens in .* wrote .*document.cache: ([\d,]+) bytes; full attention", finished.out)
    assert int(said[2].replace(",", "")) == file.stat().st_size
    flags = run, "--max_new_tokens=7", "--platform=cpu"
    asked = command("generate", *flags, f"--cache={file}", "--prompt=\nAnd ", "--prompt=\n")
    assert asked.code == 0, asked.err
    assert f"behind {said[1]} tokens of {file}; prompts of" in asked.out
    whole = []
    for question in ("\nAnd ", "\n"):
        (tmp_path / "whole.txt").write_text(text + question)
        finished = command("generate", *flags, f"--prompt_file={tmp_path}/whole.txt")
        whole.append(f"continues\n{finished.out.split(chr(10) + '[')[0].rstrip(chr(10))}\n")
    assert all(answer in asked.out for answer in whole)
    assert_refused(
        command("generate", run, f"--cache={file}", "--prompt=a", "--chat"), "--chat, but", "compress --chat"
    )
    assert_refused(command("generate", run, f"--cache={tmp_path}/absent", "--prompt=a"), "absent", "launch.compress")
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(command("generate", run, f"--cache={file}", "--prompt=a"), str(file), "truncated", "launch.compress")


def test_a_converted_model_says_the_same(command, trained, tmp_path):
    """A run, the Hugging Face directory made of it, and what both generate."""
    output = tmp_path / "hf"
    convert = f"--input={trained[0]}", f"--output={output}", "--max_shard_gb=1e-5", "--platform=cpu"
    finished = command("convert", *convert)
    assert finished.code == 0, finished.err
    assert f"wrote {output}: " in finished.out and "GistLayout(ratio=4, num_sinks=2, window=8" in finished.out
    assert len(list(output.glob("model-*.safetensors"))) > 2
    said = []
    for origin in (trained[0], output):
        flags = "--prompt=document 7", "--max_new_tokens=9", "--chunk_size=4", "--platform=cpu"
        finished = command("generate", f"--workdir={origin}", *flags)
        assert finished.code == 0, finished.err
        said.append(finished.out.split("\n[")[0])
    assert said[0].strip() and said[0] == said[1]
    assert "Hugging Face weights" in finished.out
    assert_refused(command("convert", *convert), f"--output={output} holds a model already")


def test_converting_keeps_chunks_and_the_kind_of_attention(command, trained, tmp_path):
    config = LlamaConfig(320, 16, 24, 1, 2, 1, 8, attention="autocompressors", dtype="float32")
    layout = GistLayout(ratio=4, num_sinks=8, window=28, chunk=32)
    save_hf(init_llama(config, layout, 0), tmp_path / "hf")
    Tokenizer.load(trained[0]).save(tmp_path / "hf")
    convert = f"--input={tmp_path}/hf", "--to=run", "--platform=cpu"
    finished = command("convert", *convert, f"--output={tmp_path}/run")
    assert finished.code == 0, finished.err
    model = load_directory(tmp_path / "run").model
    assert (model.layout, model.config.attention) == (layout, "autocompressors")
    refused = command("convert", *convert, f"--output={tmp_path}/other", "--window=8")
    assert_refused(refused, "--window=8", "trained with chunks of 32 raws", "leave it out")
    document = f"--document={ROOT}/Makefile", f"--output={tmp_path}/file"
    refused = command("compress", f"--workdir={tmp_path}/hf", *document, "--platform=cpu")
    assert_refused(refused, "attention is 'autocompressors'", "--config.method=unigist")


def test_the_training_benchmark_times_each_case_and_writes_table_and_figures(command, tmp_path):
    flags = "--shape=tiny --layers=1 --lengths=64 --ratios=4 --remat=attention+full --steps=1 --sinks=4 --window=8"
    flags += " --backend=reference --loss_chunk=64 --platform=cpu"
    finished = command("bench_training", f"--out={tmp_path}", *flags.split())
    assert finished.code == 0, finished.err
    full, gist = strict_json((tmp_path / "bench_training.json").read_text())["rows"]
    assert [(row["ratio"], row["remat"]) for row in (full, gist)] == [(None, "attention"), (4, "full")]
    assert "reason" not in full and "reason" not in gist
    assert gist["tokens_per_second"] == pytest.approx(64 / gist["seconds"])
    assert gist["useful_flops"] > full["useful_flops"]  # so short a row pays for its gists
    lines = (tmp_path / "bench_training.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["full", "gist r=4"]
    assert f"{full['seconds'] / gist['seconds']:.2f}x" in lines[3]
    assert lines[-1] in finished.out
    assert_refused(command("bench_training", "--mesh=pipeline=2", *flags.split()), "--mesh=pipeline=2", "AXIS=DEVICES")
    assert_refused(command("bench_training", *flags.split(), "--ratios=4,8"), "--remat=attention+full", "3 joined by +")


def test_compile_only_tells_what_a_device_needs_and_makes_no_run(command, config_file, tmp_path):
    flags = ["--compile_only", "--platform=cpu", "--config.model.vocab_size=320"]
    config = "--config", str(config_file)  # as absl takes it too
    finished = command("train", *config, f"--workdir={tmp_path}", *flags)
    assert finished.code == 0, finished.err
    assert "a step of 256 raws" in finished.out
    result = strict_json((tmp_path / "compile-cpu-1.json").read_text())
    assert result["bytes"]["total"] > 0 and [path.name for path in tmp_path.iterdir()] == ["compile-cpu-1.json"]


def test_prepared_rows_train_and_those_of_another_ratio_do_not(command, config_file, trained, tmp_path):
    rows, source = tmp_path / "rows", config_file.parent / "corpus"
    flags = [f"--source={source}", f"--tokenizer={trained[0]}", f"--output={rows}", "--workers=1"]
    finished = command("prepare_data", *flags, "--ratio=4", "--row_length=64", "--heldout_fraction=0.3")
    assert finished.code == 0, finished.err
    assert re.search(r"train: \d+ documents, [\d,]+ tokens, .* rows of 64; \d+.\d\d% padding", finished.out)
    run = [
        "train",
        f"--config={config_file}",
        f"--workdir={tmp_path}/run",
        f"--config.data.source={rows}",
        "--platform=cpu",
    ]
    refused = command(*run, "--config.gist.ratio=8")
    assert_refused(refused, "packed for ratio 4, which gist.ratio=8 does not divide", "launch.prepare_data")
    finished = command(
        *run, "--config.model.num_layers=1", "--config.model.attention_backend=reference", "--noprogress"
    )
    assert finished.code == 0, finished.err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
