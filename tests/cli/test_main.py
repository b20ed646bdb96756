"""cli: the contract of the command line, as a person and a script meet it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fork_server, tiny_models
from support.marks import wide
from support.tiny_models import contents, tensors

from milora_init import __version__
from milora_init.cli.main import run
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.run import weight as weight_run
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]
Q0 = "model.layers.0.self_attn.q_proj.weight"


class Said(NamedTuple):
    """What a command line left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        content = json.loads(self.stdout)  # all of it: anything beside the object is an error here
        assert isinstance(content, dict)
        return content


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """cli(model, *arguments) runs `milora-init --model MODEL --out out --rank 4 --device cpu` in tmp_path/work."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(model: object, *arguments: object) -> Said:
        base = ["--model", str(model), "--out", "out", "--rank", "4", "--device", "cpu"]
        status = run([*base, *map(str, arguments)])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return call


def raw(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """The command line as it stands, with nothing added."""
    status = run([*map(str, arguments)])
    captured = capsys.readouterr()
    return Said(status, captured.out, captured.err)


def require_error(said: Said, status: int, *parts: str) -> None:
    """stderr has progress, then `error:` with the value, a blank line, and `hint:`; stdout has nothing."""
    assert said.status == status
    assert said.stdout == ""
    before, found, after = said.stderr.partition("error: ")
    message, _, hint = after.partition("\n\nhint: ")
    assert found
    assert all(line.startswith(("[", "reading ")) for line in before.splitlines())
    assert said.stderr.endswith("\n")
    assert "Traceback" not in said.stderr
    for part in parts:
        assert part in message or part in hint, part


def nothing_looks_finished(out: Path) -> bool:
    return not any((out / name).exists() for name in (MANIFEST, "config.json", "lora/adapter_config.json"))


def test_a_run_ends_with_a_summary_and_the_lines_that_load_the_pair(cli: Cli, checkpoint: Built) -> None:
    source = checkpoint("llama")
    said = cli(source)
    assert said.status == 0
    for word in (
        "q_proj",
        "down_proj",
        "step-0 error",
        "leak: the part",
        "PeftModel.from_pretrained(",
        'subfolder="lora"',
    ):
        assert word in said.stdout, word
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):  # one line a shard where there is no terminal
        assert f"[{number}/{len(shards)}] {shard}: " in said.stderr
    assert (Path("out") / MANIFEST).is_file()


def test_json_is_one_object_on_stdout_without_the_weights(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--json")
    assert said.status == 0
    assert said.json["status"] == "done"
    manifest = json.loads((Path("out") / MANIFEST).read_text())
    for name in ("out", "fingerprint", "versions", "elapsed_s"):
        assert said.json[name] == manifest[name], name
    assert said.json["adapter_config"] == manifest["adapter"]
    assert "weights" not in said.json  # a large model has 10^5 of them: `report --json` prints them
    assert said.json["weight_count"] == len(manifest["weights"]) == sum(g["count"] for g in said.json["groups"])


def test_the_same_command_again_does_nothing_and_says_so(cli: Cli, checkpoint: Built) -> None:
    cli(checkpoint("llama"))
    before = contents(Path("out"))
    assert "nothing to do" in cli(checkpoint("llama")).stdout
    assert cli(checkpoint("llama"), "--json").json["status"] == "unchanged"
    assert contents(Path("out")) == before


def test_quiet_says_nothing(cli: Cli, checkpoint: Built) -> None:
    assert cli(checkpoint("llama"), "--quiet") == Said(0, "", "")


def test_verbose_has_a_line_for_every_weight(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "-v")
    for record in json.loads((Path("out") / MANIFEST).read_text())["weights"]:
        assert record["module"] in said.stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(cli: Cli, checkpoint: Built) -> None:
    source = checkpoint("llama")
    said = cli(source, "--dry-run")
    assert said.status == 0
    for shard in source.glob("*.safetensors"):
        assert shard.name in said.stdout
    for word in ("q_proj", "adapter", "memory", "time"):
        assert word in said.stdout
    assert contents(Path()) == {}


def test_a_dry_run_shows_the_strength_of_the_adapter_and_what_a_measured_target_means(
    cli: Cli, checkpoint: Built
) -> None:
    said = cli(checkpoint("llama"), "--dry-run", "--target", "kappa:0.3", "--rank", 2, "--alpha", 8).stdout
    assert "; alpha 8, scale 4, dropout 0\n" in said
    assert re.search(r"^kappa:0\.3 .*_proj of layers? 0", said, re.MULTILINE)


def test_a_dry_run_as_json_is_one_object(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--dry-run", "--json")
    assert said.json["status"] == "planned"
    assert said.json["estimate_s"] >= 0
    assert len(said.json["weights"]) == 10
    assert said.json["out_state"] == "new"
    assert contents(Path()) == {}


def test_a_dry_run_says_what_the_run_would_do_with_the_folder(cli: Cli, checkpoint: Built) -> None:
    source = checkpoint("llama")
    cli(source)
    before = contents(Path())
    assert cli(source, "--dry-run").stdout.endswith("out is already done, the run would do nothing\n")
    other = cli(source, "--dry-run", "--seed", 1)
    assert other.status == 0
    assert "the run would be refused: out holds the output of another request: seed was 0, now 1" in other.stdout
    as_json = cli(source, "--dry-run", "--seed", 1, "--json").json
    assert as_json["out_state"] == "refused"
    assert "another request: seed was 0, now 1" in as_json["warnings"][-1]
    assert cli(source, "--dry-run", "--seed", 1, "--overwrite", "--json").json["out_state"] == "replaced"
    quiet = cli(source, "--dry-run", "--seed", 1, "--quiet")
    assert quiet.stdout == ""
    assert "the run would be refused: out holds the output of another request" in quiet.stderr
    assert contents(Path()) == before


def test_options_reach_the_output(cli: Cli, checkpoint: Built) -> None:
    said = cli(
        checkpoint("bert"), "--mode", "max", "--alpha", 8, "--rslora", "--dropout", 0.2, "--task-type",
        "FEATURE_EXTRACTION", "--dtype", "float16", "--seed", 3, "-t", "query", "-t", "value", "--exclude", "value",
        "--json",
    )  # fmt: skip
    adapter = said.json["adapter_config"]
    expected = {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.2, "task_type": "FEATURE_EXTRACTION"}
    assert adapter.items() >= expected.items()
    assert adapter["target_modules"] == ["query"]
    inputs = json.loads((Path("out") / MANIFEST).read_text())["inputs"]
    assert inputs.items() >= {"mode": "max", "dtype": "float16", "seed": 3}.items()
    assert adapter == json.loads((Path("out") / "lora" / "adapter_config.json").read_text())


def test_a_recipe_is_read_and_the_command_line_beats_it(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--recipe", "qlora", "--json")
    assert said.json["adapter_config"]["r"] == 4  # the command line's
    assert said.json["adapter_config"]["lora_dropout"] == 0.1  # the recipe's
    assert said.json["weight_count"] == 14


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rank", "0"], ["rank is 0"]),
        (["--rank", "-3"], ["rank is -3"]),
        (["--rank", "four"], ["--rank"]),
        (["--mode", "minor"], ["mode is 'minor'", "min, max, mid, random"]),
        (["--dtype", "fp8"], ["dtype is 'fp8'", "bfloat16"]),
        (["--alpha", "0"], ["alpha is 0"]),
        (["--dropout", "1.5"], ["dropout is 1.5"]),
        (["--task-type", "chat"], ["task_type is 'chat'", "CAUSAL_LM"]),
        (["--recipe", "absent"], ["no recipe 'absent'", "qlora"]),
        (["--device", "tpu"], ["no device 'tpu'", "cpu"]),
        (["--quiet", "-v"], ["--quiet", "--verbose", "drop one"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["stray"], ["stray"]),
        (["--target", ""], ["target"]),
    ],
    ids=" ".join,
)
def test_a_usage_error_is_status_2_and_writes_nothing(
    arguments: list[str], parts: list[str], cli: Cli, checkpoint: Built
) -> None:
    require_error(cli(checkpoint("llama"), *arguments), 2, *parts)
    assert contents(Path()) == {}


@pytest.mark.parametrize("missing", ["--model", "--out"])
def test_a_required_option_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--model": "m", "--out": "o"}
    del given[missing]
    require_error(raw(capsys, *(word for pair in given.items() for word in pair)), 2, missing)


def test_an_unknown_recipe_key_is_status_2_and_names_the_closest(cli: Cli, checkpoint: Built) -> None:
    Path("own.yaml").write_text("tagret: [q_proj]\n")
    require_error(cli(checkpoint("llama"), "--recipe", "own.yaml"), 2, "unknown key `tagret`", "`target`")


def test_a_failure_as_json_is_one_object_on_stdout(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--rank", "0", "--json")
    assert said.status == 2
    assert said.json["status"] == "failed"
    assert said.json["exit_code"] == 2
    assert "rank is 0" in said.json["error"]
    said = cli(checkpoint("llama"), "--target", "w_proj", "--json")
    assert said.status == said.json["exit_code"] == 1
    assert "q_proj" in said.json["hint"]


def test_an_error_is_the_value_a_blank_line_and_the_repair(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--rank", 17)
    limit = "rank 17 is above the 16 that model.layers.0.self_attn.k_proj allows: its shape is [16, 32]"
    hint = "--rank 16, or --exclude k_proj,v_proj, or a rank_pattern for them in a recipe"
    assert said.stderr.splitlines()[1:] == [f"error: {limit}", "", f"hint: {hint}"]


@pytest.mark.parametrize("markup", ["[red]", "[/]", "[bold]x[/bold]"])
def test_brackets_in_a_name_are_shown_and_not_obeyed(markup: str, cli: Cli, checkpoint: Built) -> None:
    require_error(cli(checkpoint("llama"), "--target", markup), 1, markup)


@pytest.mark.parametrize("where", ["", "/", "/inside"])
def test_an_output_at_or_inside_the_model_is_refused(where: str, cli: Cli, own: Built) -> None:
    source = own("llama")
    before = contents(source)
    require_error(cli(source, "--out", f"{source}{where}", "--overwrite"), 1, "the model's folder", "--out")
    assert contents(source) == before


def broken(name: str, folder: Path) -> None:
    """Break a checkpoint in one of the ways of the list below."""
    shard = sorted(folder.glob("*.safetensors"))[2]
    index = folder / "model.safetensors.index.json"
    if name == "no config":
        (folder / "config.json").unlink()
    elif name == "no weights":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    elif name == "missing shard":
        shard.unlink()
    elif name == "shard outside":
        content = json.loads(index.read_text())
        content["weight_map"]["x"] = "../model.safetensors"
        index.write_text(json.dumps(content))
    elif name == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif name == "quantised":
        tiny_models.edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    elif name == "wrong config":
        tiny_models.edit_json(folder / "config.json", hidden_size=64)
    else:
        content = tensors(folder)
        if name == "packed":
            content[Q0] = torch.zeros(32, 32, dtype=torch.uint8)
        else:
            content[Q0][3, 4] = float(name)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("no config", ["no config.json"]),
        ("no weights", ["no weights"]),
        ("missing shard", ["is missing", "model-00003-of-"]),
        ("shard outside", ["'../model.safetensors' is outside the folder"]),
        ("truncated shard", ["model-00003-of-", "fetch the file again"]),
        ("quantised", ["quantised (gptq)", "dequantise"]),
        ("wrong config", ["different models"]),
        ("packed", [Q0, "U8", "dequantise"]),
        ("nan", [Q0, "NaN"]),
        ("inf", [Q0, "Inf"]),
        ("-inf", [Q0, "Inf"]),
    ],
)
def test_bad_input_is_one_error_that_leaves_nothing_behind(damage: str, parts: list[str], cli: Cli, own: Built) -> None:
    source = own("llama")
    broken(damage, source)
    before = contents(source)
    require_error(cli(source), 1, *parts)
    assert contents(Path()) == {}
    assert contents(source) == before


def test_a_missing_folder_is_named(cli: Cli) -> None:
    require_error(cli("./absent"), 2, "absent: no such folder")


def test_an_id_that_is_nowhere_is_named(cli: Cli, tmp_path: Path) -> None:
    said = cli("no-such-org/no-such-model", "--cache-dir", tmp_path / "cache")
    require_error(said, 1, "no-such-org/no-such-model", "neither a local folder nor")


def test_a_bad_weight_in_a_later_shard_keeps_the_done_ones_and_looks_unfinished(cli: Cli, own: Built) -> None:
    source = own("llama")
    name, shard = "model.layers.1.mlp.down_proj.weight", ""
    for path in sorted(source.glob("*.safetensors")):
        content = load_file(path)
        if name in content:
            content[name][0, 0] = float("nan")
            save_file(content, path, metadata={"format": "pt"})
            shard = path.name
    require_error(cli(source), 1, name, shard)
    assert nothing_looks_finished(Path("out"))
    assert (Path("out") / WORK_FOLDER).is_dir()
    assert not list(Path("out").rglob("*.partial"))


def test_a_residual_that_overflows_names_the_tensor_and_the_way_out(cli: Cli, own: Built) -> None:
    source = own("llama")
    content = tensors(source)
    content[Q0][0, 0] = 1e6
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    require_error(cli(source, "--dtype", "float16"), 1, Q0, "overflows float16", "--dtype float32")
    assert contents(Path()) == {}


def test_an_interruption_is_status_130_and_says_how_to_go_on(
    cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_run, "split", interrupted)
    require_error(cli(checkpoint("llama")), 130, "interrupted", "it keeps the files that were finished")


def test_an_error_of_ours_is_reported_as_one_and_not_as_a_traceback(
    cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(weight_run, "split", fail)
    require_error(cli(checkpoint("llama")), 1, "ZeroDivisionError: unforeseen", "MILORA_DEBUG=1")
    monkeypatch.setenv("MILORA_DEBUG", "1")
    said = cli(checkpoint("llama"))
    assert said.status == 1
    assert "Traceback" in said.stderr
    assert "run/weight.py" in said.stderr
    assert cli(checkpoint("llama"), "--mode", "minor").status == 2  # a status means the same, however much is told


def test_a_token_is_never_shown(cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for said in (cli(checkpoint("llama"), "--dry-run", "--json"), cli(checkpoint("llama"), "--json")):
        assert said.status == 0
        assert "hf_secret" not in said.stdout + said.stderr
    assert not [name for name, content in contents(Path()).items() if b"hf_secret" in content]


def test_no_color_is_honoured(cli: Cli, checkpoint: Built) -> None:
    said = cli(checkpoint("llama"), "--mode", "minor")
    assert "\x1b[" not in said.stderr


def test_help_names_every_option_of_init(capsys: pytest.CaptureFixture[str]) -> None:
    said = raw(capsys, "init", "--help")
    assert said.status == 0
    for option in (
        "--model", "--out", "--rank", "--mode", "--recipe", "--target", "--exclude", "--alpha", "--rslora",
        "--dropout", "--task-type", "--text-only", "--dtype", "--device", "--seed", "--revision", "--cache-dir",
        "--token", "--dry-run", "--overwrite", "--json", "--quiet",
    ):  # fmt: skip
        assert option in said.stdout, option
    assert raw(capsys, "init", "-h").stdout == said.stdout


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    said = raw(capsys, "--version")
    assert (said.status, said.stderr) == (0, "")
    assert __version__ in said.stdout


def test_the_command_leaves_with_its_status_and_pure_json(checkpoint: Built, tmp_path: Path) -> None:
    """As a script meets it, in a process of its own: only the object on stdout, only the exit status to go by."""
    command = ["-m", checkpoint("llama"), "-o", tmp_path / "out", "--json"]
    good = fork_server.milora(*command, "-r", "4")
    assert (good.returncode, json.loads(good.stdout)["status"]) == (0, "done")
    bad = fork_server.milora(*command, "-r", "0")
    assert (bad.returncode, json.loads(bad.stdout)["status"]) == (2, "failed")
    assert bad.stderr.startswith("error: ")


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_an_answer_that_needs_no_model_imports_no_torch(argument: str, status: int) -> None:
    code = (
        "import sys; from milora_init.cli.main import run; status = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'safetensors'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


def shell(words: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line with its redirections, as a shell runs it: `milora` stands for the command."""
    script = words.replace("milora", f'"{sys.executable}" -m milora_init')
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


FULL = Path("/dev/full")


@pytest.mark.parametrize(
    "streams",
    [
        {"stderr": FULL}, wide({"stderr": None}), wide({"stdout": FULL}), {"stdout": None},
        {"stdin": None, "stdout": None, "stderr": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_is_done_whether_or_not_anybody_can_be_told(
    streams: dict[str, Path | None], checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    done = fork_server.milora("-m", source, "-o", out, "-r", "4", "--device", "cpu", **streams)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert verify(str(out), model=str(source)).ok


@pytest.mark.wide
@pytest.mark.parametrize("redirected", [pytest.param("2> >(true)", marks=pytest.mark.slow), "<&- >&- 2>&-"])
def test_a_run_that_a_shell_starts_is_done_too(redirected: str, checkpoint: Built, tmp_path: Path) -> None:
    done = shell(f'milora -m "$1" -o "$2" -r 4 --device cpu {redirected}', checkpoint("llama"), tmp_path / "out")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert verify(str(tmp_path / "out"), model=str(checkpoint("llama"))).ok


@pytest.mark.parametrize("stdout", [FULL, None])
@pytest.mark.parametrize("words", ["report OUT", "report OUT --json", "verify OUT --json", "--help"])
def test_an_answer_that_is_lost_is_no_success(words: str, stdout: Path | None, out: Path) -> None:
    arguments = [str(out) if word == "OUT" else word for word in words.split()]
    done = fork_server.milora(*arguments, stdout=stdout)
    assert done.returncode == 1
    assert "error: stdout cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("redirected", [">/dev/full", ">&-"])
def test_a_version_that_a_shell_has_nowhere_to_put_is_no_success(redirected: str) -> None:
    done = shell(f"milora --version {redirected}")
    assert done.returncode == 1
    assert "error: stdout cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_had_enough_is_no_failure(out: Path) -> None:
    done = shell('set -o pipefail; milora report "$1" --json | true', out)
    assert (done.returncode, done.stderr) == (0, "")


MAKE = "run(['-m', source, '-o', out, '-r', '4', '--device', 'cpu']) or run(['verify', out]) or "


@pytest.mark.parametrize(
    "before", [wide(""), pytest.param(MAKE, marks=pytest.mark.slow)], ids=["report", "init and verify"]
)
def test_an_ascii_locale_can_name_any_folder(before: str, checkpoint: Built, finished: Built, tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    source, out = tmp_path / "sürce", tmp_path / "öut"
    source.symlink_to(checkpoint("llama"))
    if not before:
        out.symlink_to(finished())
    code = (
        "import sys; from milora_init.cli.main import run; "
        "from milora_init.cli.streams import replace_standard_streams; replace_standard_streams(); "
        "_, source, out = sys.argv; "
        f"sys.exit({before}run(['report', out, '--markdown']))"
    )
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), **ascii_only}
    command = [sys.executable, "-c", code, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (MemoryError(), ["not enough memory", "--dry-run"]),
        (RuntimeError("can't start new thread"), ["no further thread", "ulimit -u"]),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            ["not enough memory"],
        ),
        (ImportError("libx.so: failed to map segment from shared object"), ["not enough memory"]),
        (ImportError("libx.so: undefined symbol"), ["libx.so: undefined symbol", "pip install"]),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "f"), ["f: Too many open files", "ulimit -n"]),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "f"), ["f: Read-only", "read-only"]),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "f"), ["f: Permission", "permissions"]),
    ],
    ids=str,
)
def test_what_the_machine_refuses_is_not_ours_to_be_reported(
    error: Exception, parts: list[str], cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(weight_run, "split", fail)
    said = cli(checkpoint("llama"))
    require_error(said, 1, *parts)
    assert "please report" not in said.stderr


@pytest.mark.parametrize("option", ["--model", "--out", "--cache-dir", "--recipe", "--revision", "--push-to-hub"])
def test_a_nul_character_is_a_usage_error(option: str, cli: Cli, checkpoint: Built) -> None:
    require_error(cli(checkpoint("llama"), option, "a\0b"), 2, "NUL")


@pytest.mark.parametrize("words", [["verify", "a\0b"], ["merge", "x", "--adapter", "a\0b", "--out", "o"]])
def test_a_nul_character_behind_a_verb_is_one_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    require_error(raw(capsys, *words), 2, "NUL")


@pytest.mark.parametrize(
    "words",
    [
        ["~no-such-user/x", "-o", "o"], ["MODEL", "-o", "~no-such-user/x"], ["verify", "~no-such-user/x"],
        ["merge", "MODEL", "--adapter", "~no-such-user/x", "--out", "o"], ["push", "~no-such-user/x", "me/x"],
        ["scan", "m", "--html", "~no-such-user/x.html"],
    ],
)  # fmt: skip
def test_a_home_of_nobody_is_a_usage_error(
    words: list[str], checkpoint: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    said = raw(capsys, *(str(checkpoint("llama")) if word == "MODEL" else word for word in words))
    require_error(said, 2, "~ names a user that is not known")


def test_an_interruption_speaks_of_the_command_and_not_of_a_word(
    cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_run, "split", interrupted)
    Path("verify").symlink_to(checkpoint("llama"))
    require_error(cli("verify"), 130, "it keeps the files that were finished")
    monkeypatch.setattr("milora_init.verification.verify.verify", interrupted)
    require_error(raw(capsys, "verify", "out"), 130, "run the same command again")


def test_a_plan_measures_the_device_that_it_is_for(
    cli: Cli, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def rate(device: torch.device) -> float:
        measured.append(str(device))
        return 1e9

    monkeypatch.setattr("milora_init.run.devices.multiply_rate", rate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli(checkpoint("llama"), "--dry-run").status == 0  # with --device cpu
    assert measured == ["cpu"]


def test_float32_is_not_advised_where_it_is_what_overflows(cli: Cli, own: Built) -> None:
    source = own("llama")
    content = tensors(source)
    content[Q0] = content[Q0].double()
    content[Q0][0, 0] = 1e60
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    said = cli(source, "--dtype", "float32")
    require_error(said, 1, Q0, "overflows float32")
    assert "--dtype float32" not in said.stderr
