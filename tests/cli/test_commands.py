"""The commands: how they are called, and what they have in common."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.marks import wide

from milora_init.cli import output
from milora_init.cli.main import COMMANDS, app, run
from milora_init.cli.params import current_spelling
from milora_init.envelope import STATUSES
from milora_init.manifest import Manifest
from milora_init.options import DTYPE_FLAGS, SYNONYMS, InitOptions, recipe_names, recipe_text

Built = Callable[..., Path]
Start = Callable[..., Manifest]
ON_THE_CPU = ["--rank", "4", "--device", "cpu", "--quiet"]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """said(*words) runs a command line and returns its status, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        status = run([*map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


Said = Callable[..., tuple[int, str, str]]


# How init is called


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "MODEL", "--out", "OUT"],
        ["-m", "MODEL", "-o", "OUT"],
        ["MODEL", "--out", "OUT"],
        ["--out", "OUT", "MODEL"],
        ["init", "MODEL", "-o", "OUT"],
        ["init", "--model", "MODEL", "--out", "OUT"],
        ["init", "MODEL", "--model", "MODEL", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_the_model_is_the_first_word_or_an_option_and_init_can_be_left_out(
    words: list[str], checkpoint: Built, tmp_path: Path, said: Said
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    given = [{"MODEL": source, "OUT": out}.get(word, word) for word in words]
    assert said(*given, *ON_THE_CPU)[0] == 0
    assert (out / "milora_init.json").is_file()


def test_two_different_models_are_refused(said: Said) -> None:
    status, _, error = said("init", "./one", "--model", "./two", "--out", "o")
    assert status == 2
    assert "two models are given: ./one and ./two" in error


@pytest.mark.parametrize(("word", "meant"), [("verfy", "verify"), ("megre", "merge"), ("converts", "convert")])
def test_a_mistyped_command_is_named_with_the_one_that_was_meant(word: str, meant: str, said: Said) -> None:
    status, _, error = said(word, "./svd_init")
    assert (status, error) == (2, f"error: no command {word!r}\n\nhint: did you mean `milora-init {meant}`?\n")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["m", "-o", "o", "-t", "q_proj", "v_proj"], "give each value with its own option: -t A -t B"),
        (["m", "--lora_target", "q", "v"], "give each value with its own option: --lora_target A --lora_target B"),
        (["m", "out"], "the folder to write is an option: --out out"),
        (["m", "--rank", "8", "out"], "the folder to write is an option: --out out"),
        (["m", "--rank", "8", "out", "-o", "x"], "milora-init init --help"),
        (["scan", "m", "--rank", "8", "16"], "give each value with its own option: --rank A --rank B"),
        (["verify", "m", "n", "-a", "t"], "milora-init verify --help"),
    ],
)  # fmt: skip
def test_values_that_stand_one_after_another_are_explained(words: list[str], hint: str, said: Said) -> None:
    status, _, error = said(*words)
    assert (status, error.splitlines()[-1]) == (2, f"hint: {hint}")


@pytest.mark.parametrize("words", [["verify"], ["scan", "m", "--bogus"], ["m", "--out", "o", "--rank", "x"]])
def test_a_parse_error_has_its_class_in_the_json(words: list[str], said: Said) -> None:
    status, text, _ = said(*words, "--json")
    failed = json.loads(text)
    assert (status, failed["exit_code"], failed["error_type"]) == (2, 2, "UsageError")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--out", "o", "--rank", "x"], "--rank 'x' is not a whole number"),
        (["m", "--out", "o", "--rank=1.5"], "--rank '1.5' is not a whole number"),
        (["convert", "p", "-a", "t", "-o", "c", "--energy", "most"], "--energy 'most' is not a number"),
    ],
)
def test_what_is_no_number_is_named_with_its_option(words: list[str], message: str, said: Said) -> None:
    status, _, error = said(*words)
    assert (status, message in error) == (2, True), error


def test_ranks_of_a_scan_may_be_separated_by_commas(checkpoint: Built, said: Said) -> None:
    status, text, _ = said("scan", checkpoint("llama"), "--rank", "2,4", "--device", "cpu", "--json")
    assert (status, json.loads(text)["ranks"]) == (0, [2, 4])
    status, _, error = said("scan", checkpoint("llama"), "--rank", "2,x")
    assert (status, "--rank 'x' is not a number" in error) == (2, True)


def test_a_folder_with_the_name_of_a_mistyped_command_is_a_model(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("verfy").symlink_to(checkpoint("llama"))
    assert said("verfy", "--out", "out", *ON_THE_CPU)[0] == 0


@pytest.mark.parametrize(
    "words", [["--json", "verify", "out"], ["-q", "push", "out", "me/x"], ["--rank", "4", "merge"]]
)
def test_options_before_a_command_are_answered_with_the_right_order(words: list[str], said: Said) -> None:
    command = next(word for word in words if word in COMMANDS)
    status, _, error = said(*words)
    assert status == 2
    assert f"milora-init {command}" in error.partition("hint: ")[2]


def test_without_a_word_the_help_is_shown_and_it_is_no_success(said: Said) -> None:
    status, text, _ = said()
    assert status == 2
    assert "Usage: milora-init" in text


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_an_option_of_the_root(option: str, said: Said) -> None:
    status, text, _ = said(option)
    assert status == 0
    assert text.startswith("milora-init ")


def test_the_root_help_has_every_command_and_examples(said: Said) -> None:
    _, text, _ = said("--help")
    for word in (*COMMANDS, "Examples", "meta-llama/Llama-2-7b-hf", "docs/"):
        assert word in text, word
    assert len(text.splitlines()) < 60  # one screen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help_and_a_hint_to_it_in_its_errors(command: str, said: Said) -> None:
    status, text, _ = said(command, "--help")
    assert status == 0
    assert re.search(rf"Examples?\s+milora-init ({command}|\S+ )", text) or command == "init"
    assert "--json" in text
    assert "--quiet" in text
    status, _, error = said(command, "--no-such-option")
    assert status == 2
    assert f"hint: milora-init {command} --help" in error


@pytest.mark.parametrize("command", ["--help", *COMMANDS])
def test_no_name_is_cut_off_in_a_help_of_60_columns(command: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, text, _ = said(command, "--help")
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "milora_init", "-V"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("milora-init ")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ver", "verify"),
        ("--ran", "--rank"),
        wide("--vers", "--version"),
        wide("init --method ml", ""),
        ("init --method ol", "olora-tail"),
        ("init -c com", "commonsense"),
        wide("recipes qlo", "qlora"),
        wide("convert --for v", "vllm"),
    ],
)
def test_the_shell_completes_commands_options_and_their_values(typed: str, expected: str) -> None:
    words = {
        "_MILORA_INIT_COMPLETE": "complete_bash", "COMP_WORDS": f"milora-init {typed}",
        "COMP_CWORD": str(len(typed.split())),
    }  # fmt: skip
    command = [sys.executable, "-c", "from milora_init.cli.main import app; app(prog_name='milora-init')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **words})
    assert expected in done.stdout.split() if expected else not done.stdout.split()


# Other spellings


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("verify", "out --against MODEL", "out --model MODEL"),
        ("verify", "out --against=MODEL --all", "out --model=MODEL --all"),
        ("merge", "out --against MODEL --out m", "out --model MODEL --out m"),
        ("convert", "--init out/lora --trained t --out p --base M", "out/lora --adapter t --out p --model M"),
        ("convert", "--init=out/lora --trained=t", "out/lora --adapter=t"),
        ("push", "out me/x --revision b --yes", "out me/x --branch b --overwrite"),
        ("init", "--config qlora --r 8 --lora_alpha 16", "--recipe qlora --rank 8 --alpha 16"),
        ("init", "--model_name_or_path M --output_dir O --lora_target q", "--model M --out O --target q"),
        ("init", "M --bf16", "M --dtype bfloat16"),
        ("init", "M -- --r", "M -- --r"),
        ("report", "out --json", "out --json"),
    ],
)
def test_other_spellings_mean_the_option_that_help_shows(command: str, old: str, new: str) -> None:
    assert current_spelling(command, old.split()) == new.split()


def test_no_help_shows_another_spelling(said: Said) -> None:
    for command, spellings in {
        "init": ["--config", "--yes", "--lora", "--bf16"], "verify": ["--against"], "merge": ["--against"],
        "convert": ["--init", "--trained", "--base"], "push": ["--revision", "--yes"],
    }.items():  # fmt: skip
        text = said(command, "--help")[1]
        assert not [spelling for spelling in spellings if spelling in text], command


@pytest.mark.parametrize("word", SYNONYMS)
def test_words_of_other_trainers_are_understood_in_recipes_and_python(word: str, tmp_path: Path) -> None:
    name = SYNONYMS[word]
    value: Any = {"rank": 8, "alpha": 16, "dropout": 0.2, "rslora": True, "target": ["a_proj"], "exclude": ["b"]}.get(
        name, "text"
    )
    given = {"model": "m", "out": "o"}
    given.pop(name, None)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps({word: value}))
    for options in (
        InitOptions.from_recipe(str(recipe), **given),
        InitOptions.from_recipe(**given, **{word: value}),
    ):
        found = getattr(options, name)
        assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("given", "dtype"), [("bf16", "bfloat16"), ("torch.float16", "float16"), ("fp32", "float32")])
def test_a_dtype_has_its_usual_names(given: str, dtype: str) -> None:
    assert InitOptions(model="m", out="o", dtype=given).dtype == dtype
    if given in DTYPE_FLAGS:
        assert InitOptions.from_recipe(model="m", out="o", **{given: True}).dtype == dtype


@pytest.mark.parametrize(("given", "mode"), [("milora", "min"), ("pissa", "max")])
def test_a_mode_can_be_named_by_its_method(given: Any, mode: str) -> None:
    assert InitOptions(model="m", out="o", mode=given).mode == mode


def test_targets_can_be_separated_by_commas(checkpoint: Built, tmp_path: Path, said: Said) -> None:
    status, text, _ = said(
        checkpoint("llama"), "-o", tmp_path / "o", "-t", "q_proj,v_proj", "-r", "4", "--dry-run", "--json"
    )
    assert status == 0
    assert json.loads(text)["adapter_config"]["target_modules"] == ["q_proj", "v_proj"]


def test_two_names_for_one_option_are_refused(tmp_path: Path, said: Said) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("rank: 4\nlora_r: 8\n")
    status, _, error = said("m", "-o", "o", "--recipe", recipe)
    assert status == 2
    assert "`rank` and `lora_r` are two names of one option" in error
    for words in (("--lora_r", "4", "--rank", "8"), ("--bf16", "--fp16"), ("--dtype", "float32", "--bf16")):
        status, _, error = said("m", "-o", "o", *words)
        assert status == 2
        assert "are two names of one option" in error


def test_a_model_without_the_default_targets_gets_all_linear_and_a_warning(
    checkpoint: Built, tmp_path: Path, said: Said
) -> None:
    status, text, _ = said(checkpoint("gpt2"), "-o", tmp_path / "o", "-r", "4", "--dry-run", "--json")
    plan = json.loads(text)
    assert status == 0
    assert any("lacks q_proj" in warning and "all-linear" in warning for warning in plan["warnings"])
    assert {weight["module"].rpartition(".")[2] for weight in plan["weights"]} == {"c_attn", "c_proj", "c_fc"}
    status, _, error = said(checkpoint("gpt2"), "-o", tmp_path / "o", "--recipe", "math", "--dry-run")
    assert status == 1  # a recipe that was named is not replaced
    assert "q_proj" in error


# The same mistake has the same answer in every command

OTHER_WORDS = {
    "init": ["-o", "o"], "merge": ["--out", "m"], "convert": ["--adapter", "a", "--out", "p"], "push": ["me/x"],
}  # fmt: skip


@pytest.mark.parametrize("command", ["init", "verify", "report", "merge", "convert", "push"])
def test_a_missing_folder_is_the_same_error_everywhere(command: str, said: Said) -> None:
    status, text, error = said(command, "./absent", *OTHER_WORDS.get(command, []))
    assert (status, text) == (2, "")
    assert "absent: no such folder" in error


@pytest.mark.parametrize("command", ["init", "verify", "report", "merge", "convert", "push"])
def test_quiet_and_verbose_exclude_each_other_everywhere(command: str, said: Said) -> None:
    status, text, error = said(command, "./absent", *OTHER_WORDS.get(command, []), "-q", "-v")
    assert (status, text) == (2, "")
    assert error == "error: --quiet and --verbose exclude each other\n\nhint: drop one of them\n"


# report, recipes, env, --fail-on


def test_a_report_shows_a_finished_run_again(checkpoint: Built, start: Start, tmp_path: Path, said: Said) -> None:
    manifest = start(checkpoint("llama"))
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved")
    status, text, _ = said("report", moved)
    assert status == 0
    assert f"{moved}: 10 weights" in text
    assert f'from_pretrained("{moved}"' in text
    status, text, _ = said("report", moved, "--json")
    answer = json.loads(text)
    assert (status, answer["fingerprint"], answer["out"]) == (0, manifest.fingerprint, moved)
    assert len(answer["weights"]) == 10
    assert f"### milora-init: {moved}\n" in said("report", moved, "--markdown")[1]
    assert all(weight.module in said("report", moved, "-v")[1] for weight in manifest.weights)
    assert said("report", moved, "-q") == (0, "", "")
    status, _, error = said("report", moved, "--markdown", "--json")
    assert status == 2
    assert "exclude each other" in error


def test_recipes_are_listed_and_printed_as_their_files_are(said: Said) -> None:
    status, text, _ = said("recipes")
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()[1:] if line[0] != " "] == recipe_names()
    assert max(map(len, text.splitlines())) <= 100
    assert "llm-adapters (default)" in text
    for name in recipe_names():
        assert said("recipes", name) == (0, recipe_text(name), "")
    assert json.loads(said("recipes", "math", "--json")[1])["recipes"]["math"]["rank"] == 64
    status, _, error = said("recipes", "absent")
    assert status == 2
    assert "no recipe 'absent'" in error


def test_env_names_versions_and_devices_and_no_secret(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for words in (["env"], ["env", "--json"]):
        status, text, _ = said(*words)
        assert status == 0
        assert "hf_secret" not in text
        assert "torch" in text
    facts = json.loads(said("env", "--json")[1])
    assert facts["versions"]["milora-init"]
    assert facts["environment"]["HF_TOKEN"] == "set"


def test_env_prints_every_variable_of_its_page(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "environment.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall("`([A-Z_]+)", row)}
    assert {"MILORA_DEBUG", "RANK", "SLURM_ARRAY_TASK_COUNT", "HF_TOKEN"} <= names
    for name in names - {"HF_TOKEN"}:
        monkeypatch.setenv(name, "0")
    _, text, _ = said("env", "--json")
    assert set(json.loads(text)["environment"]) == names


@pytest.mark.parametrize(("limit", "status"), [("leak=1000", 0), ("leak=0", 1), ("error=0", 1), ("error=1", 0)])
def test_fail_on_gives_status_1_and_keeps_the_output(
    limit: str, status: int, checkpoint: Built, tmp_path: Path, said: Said
) -> None:
    source = checkpoint("llama", "bfloat16")
    found, _, error = said(source, "-o", tmp_path / "out", *ON_THE_CPU, "--fail-on", limit)
    assert found == status
    assert (f"--fail-on {limit.partition('=')[0]}=" in error) == bool(status)
    assert ("the output itself is complete" in error) == bool(status)
    found, text, _ = said(source, "-o", tmp_path / "out", *ON_THE_CPU, "--fail-on", limit, "--json")
    assert found == status
    name, _, value = limit.partition("=")
    exceeded = [(of["name"], of["limit"]) for of in json.loads(text).get("exceeded", [])]
    assert exceeded == [(name, float(value))] * status
    assert json.loads(text).get("exit_code", 0) == status
    assert (tmp_path / "out" / "milora_init.json").is_file()


@pytest.mark.parametrize("limit", ["leak", "leak=", "leak=x", "leak=nan", "leak=-1", "size=3"])
def test_a_limit_that_is_none_is_a_usage_error(limit: str, tmp_path: Path, said: Said) -> None:
    status, _, error = said("m", "-o", tmp_path / "out", "--fail-on", limit)
    assert status == 2
    assert f"--fail-on {limit} is not a limit" in error


def test_a_limit_of_a_figure_that_the_method_does_not_have_is_a_usage_error(tmp_path: Path, said: Said) -> None:
    status, _, error = said("m", "-o", tmp_path / "out", "--method", "rlmo", "--fail-on", "leak=0.1")
    assert (status, "method rlmo writes no base, so nothing is rounded and there is no leak" in error) == (2, True)


# Answers without the model class


def test_a_finished_and_a_refused_request_are_answered_without_torch(
    checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    start(source)
    code = (
        "import sys; from milora_init.cli.main import run; status = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'safetensors'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    for rank, status, words in ((4, 0, "already done"), (3, 1, "rank was 4, now 3")):
        command = [sys.executable, "-c", code, str(source), "-o", str(tmp_path / "out"), "-r", str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


def test_the_quick_answer_is_that_of_the_full_plan(
    checkpoint: Built, own: Built, start: Start, tmp_path: Path, said: Said
) -> None:
    source = own("llama")
    start(source, target=("q_proj",))
    words = [source, "-o", tmp_path / "out", "-r", "4", "--device", "cpu", "--json"]
    assert json.loads(said(*words, "-t", "q_proj")[1])["status"] == "unchanged"
    assert json.loads(said(*words, "-t", "re:.*q_proj")[1])["status"] == "unchanged"  # other words, the same weights
    status, text, _ = said(*words, "-t", "k_proj")
    assert status == 1
    assert "another request: modules was" in json.loads(text)["error"]
    (tmp_path / "out" / "model-00001-of-00010.safetensors").unlink(missing_ok=True)
    next((tmp_path / "out").glob("*.safetensors")).write_bytes(b"")
    assert "changed or removed" in json.loads(said(*words, "-t", "q_proj")[1])["error"]


# JSON


def test_every_command_prints_the_same_envelope(checkpoint: Built, start: Start, tmp_path: Path, said: Said) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    start(source)
    for words in (
        ["init", source, "-o", out, "-r", 4], ["init", source, "-o", "new", "-r", 4, "--dry-run"],
        ["verify", out], ["report", out], ["merge", out, "-o", tmp_path / "merged"], ["recipes"], ["env"],
        ["verify", "./absent"], ["convert", out, "--adapter", out / "lora", "-o", tmp_path / "plain"],
    ):  # fmt: skip
        content = json.loads(said(*words, "--json")[1])
        first = ["schema", "command", "status", "out", "fingerprint", "source", "warnings"]
        assert list(content)[: len(first)] == first
        assert (content["schema"], content["command"]) == (1, words[0])
        assert content["status"] in STATUSES


def test_a_signal_after_the_answer_adds_no_second_one(said: Said, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_after(content: object, real: Callable[..., None] = output.json_output.give) -> None:
        real(content)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(output.json_output, "give", interrupt_after)
    status, text, _ = said("report", out, "--json")
    assert status == 130
    assert json.loads(text)["status"] == "done"


def test_a_recipe_may_name_the_model_and_the_output(checkpoint: Built, tmp_path: Path, said: Said) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {checkpoint('llama')}\nout: {tmp_path / 'out'}\nrank: 3\ntarget: [q_proj]\n")
    status, text, _ = said("--recipe", recipe, "--dry-run", "--json")
    assert (status, json.loads(text)["out"]) == (0, str(tmp_path / "out"))
    status, _, error = said("--rank", "3")
    assert status == 2
    assert "no --model and no --out given" in error


def test_all_commands_are_registered() -> None:
    assert [command.name for command in app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "p", "--revision", "v2"], "--revision v2 is of the original model, which is not given"),
        (["verify", "https://huggingface.co/org/llama"], "is an address, not a folder or a Hub id"),
        (["https://huggingface.co/org/llama", "-o", "o"], "hint: write its Hub id: org/llama"),
        (["m", "-o", "o", "--private", "--public"], "--private and --public exclude each other"),
        (["push", "me/x", "."], "hint: the folder comes first: milora-init push . me/x"),
        (["scan", "--model", "a", "b"], "hint: milora-init scan --help"),
        (["verify", "p", "t"], "hint: a trained adapter is an option: --adapter t"),
        (["convert", "p", "t"], "hint: a trained adapter is an option: --adapter t"),
        (["merge", "p", "o"], "hint: only PAIR is given without an option: the folder to write --out o"),
        (["merge", "p", "t", "o"], "the trained adapter --adapter t and the folder to write --out o"),
    ],
)
def test_a_mistake_in_the_words_is_named_with_its_repair(words: list[str], message: str, said: Said) -> None:
    status, _, error = said(*words)
    assert (status, message in error) == (2, True), error


@pytest.mark.parametrize(("words", "usage"), [(["help"], "COMMAND"), (["help", "merge"], "merge")])
def test_the_word_help_is_the_option(words: list[str], usage: str, said: Said) -> None:
    status, text, _ = said(*words)
    assert (status, usage in text.splitlines()[1]) == (0, True), text
