"""A chat model fine-tuned as a user would: messages in a file, run, resume, evaluate, split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import merged, tiny_model
from chat_templates import FAMILIES, GEMMA_2, chat_tokenizer
from commands import invoke, refused, toml_of
from peers import RemoteRun, evaluations, local_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import meerkat
from meerkat.config import load_recipe, parse_recipe
from meerkat.data.clients import write_client_folders
from meerkat.node.config import NodeConfig
from meerkat.node.runtime import ClientRuntime
from meerkat.runs.assembly import assemble
from meerkat.runs.remote_run import load_server_mask
from meerkat.transport.handshake import Proof, difference

SCORES = ["rouge_l", "token_f1", "exact_match", {"kind": "regex", "pattern": "[a-z]+"}]
NAMES = ["loss", "rouge_l", "token_f1", "exact_match", "regex"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    loaded = tiny_model("llama", max_position_embeddings=256)
    loaded.model.save_pretrained(folder)
    chat_tokenizer(FAMILIES["smollm-2"]).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path, lines = tmp_path / "chat.jsonl", []
    for n in range(60):
        messages = [
            {"role": "user", "content": f"It was film {n}?"},
            {"role": "assistant", "content": ("great", "terrible")[n % 2]},
        ]
        if n % 3 == 0:
            messages += [
                {"role": "user", "content": "Yes or No?"},
                {"role": "assistant", "content": "Yes"},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], chat_model: Path, rows: Path) -> dict[str, Any]:
    found = merged(
        tiny_recipe_data,
        model={"name": str(chat_model)},
        federation={"clients": 2, "rounds": 2, "partition": {"kind": "iid"}},
        evaluation={"examples": 4, "every": 1, "metrics": SCORES, "max_new_tokens": 5},
    )
    found["task"] = {"name": "custom", "format": "chat", "source": str(rows), "max_length": 96}
    found["federation"]["partition"] = {"kind": "iid"}
    return found


@pytest.fixture
def recipe(data: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(toml_of(data))
    return path


def test_run_resume_evaluate_and_export(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    done = invoke("run", recipe, "--out", out)
    assert done.exit_code == 0, done.output
    assert "ROUGE-L" in done.output
    found = evaluations(out)
    assert [list(e.metrics) for e in found] == [NAMES] * 3
    assert all(0 <= e.metrics[name] <= 1 for e in found for name in NAMES[1:])
    assert len({e.metrics["loss"] for e in found}) == 3
    again = invoke("resume", out)
    assert again.exit_code == 0, again.output

    shown = invoke("evaluate", out, "--show", "2", "--json")
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert {name: figures[name] for name in NAMES} == pytest.approx(found[-1].metrics, abs=1e-6)
    assert len(figures["answers"]) == 2
    assert figures["answers"][0]["reference"] in ("great", "terrible", "Yes")
    assert figures["answers"][0]["prompt"].endswith("<|im_start|>assistant\n")
    plain = invoke("evaluate", out, "--show", "1")
    assert "reference" in plain.output

    exported = tmp_path / "model"
    assert invoke("export", out, "--to", exported).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == FAMILIES["smollm-2"].template
    asked = figures["answers"][0]["prompt"]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.strip() == figures["answers"][0]["answer"]

    card = (exported / "README.md").read_text("utf-8")
    assert "| examples | conversations, in the model's chat template |" in card
    assert "| prompt |" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "apply_chat_template" in code
    monkeypatch.chdir(exported)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("own", [False, True], ids=["partition", "folders"])
def test_a_remote_run_is_the_local_run(recipe: Path, tmp_path: Path, own: bool) -> None:
    parsed = load_recipe(recipe)
    meerkat.calibrate(recipe, out=tmp_path / "mask.safetensors")
    local = local_run(parsed, tmp_path / "local")
    nodes = None
    if own:
        folders = write_client_folders(parsed, tmp_path / "folders")
        nodes = [NodeConfig(number, data=folder) for number, folder in enumerate(folders)]
    mask = load_server_mask(tmp_path / "mask.safetensors")
    remote = RemoteRun(parsed, tmp_path / "remote", mask, nodes).run()
    assert remote["state_digest"] == local["state_digest"]
    assert remote["after"] == pytest.approx(local["after"], abs=1e-6)


def test_a_client_whose_tokenizer_has_another_template_is_refused(
    recipe: Path, chat_model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(chat_model, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{# changed #}" + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    mask = meerkat.calibrate(recipe, out=tmp_path / "mask.safetensors").path
    server = load_server_mask(mask).configuration

    def proof(*changes: str) -> Proof:
        return ClientRuntime(assemble(load_recipe(recipe, changes)), mask, own=False).proof

    right, wrong = proof(), proof(f"model.name={other}")
    assert right.configuration == server
    assert (right.model, right.probe) == (wrong.model, wrong.probe)
    said = difference(wrong, right)
    assert said is not None
    assert said.startswith("the client's configuration or tokenizer is")
    assert "chat template" in said
    # A template of the recipe is everybody's.
    own = 'task.chat_template="""' + FAMILIES["smollm-2"].template.replace("\\", "\\\\") + '"""'
    assert proof(own).configuration == proof(own, f"model.name={other}").configuration


def test_a_mask_that_was_made_for_another_task_serves(
    recipe: Path, tiny_recipe_data: dict[str, Any], chat_model: Path, tmp_path: Path
) -> None:
    """Templates have no part in a mask."""
    plain = parse_recipe(merged(tiny_recipe_data, model={"name": str(chat_model)}))
    mask = meerkat.calibrate(plain, out=tmp_path / "mask.safetensors").path
    changed = load_recipe(recipe, [f"mask.file={mask}", "federation.rounds=1"])
    assert meerkat.run(changed, tmp_path / "run", observers=())["rounds"] == 1


def test_a_subspace_from_questions_that_the_model_answers(
    data: dict[str, Any], sentences_file: Path, tmp_path: Path
) -> None:
    subspace = {"dimensions": 4, "texts": 8, "corpus": str(sentences_file), "answer_tokens": 3}
    path = tmp_path / "subspace.toml"
    evaluation = {"metrics": [], "every": 0}
    path.write_text(toml_of(merged(data, subspace=subspace, evaluation=evaluation)))
    done = invoke("run", path, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    changed = ["--set", "subspace.corpus=model", "--set", "federation.rounds=1"]
    assert invoke("run", path, "--out", tmp_path / "written", *changed).exit_code == 0


def test_refusals_are_one_line(recipe: Path, rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    no_template = invoke("run", recipe, *out, "--set", f"model.name={tiny_folder}")
    refused(no_template, "no chat template", "task.chat_template")
    file = tmp_path / "gemma.jinja"
    file.write_text(GEMMA_2.replace("<end_of_turn>", "<|im_end|>"))
    named = invoke("plan", recipe, "--set", f"task.chat_template={tmp_path / 'none.jinja'}")
    refused(named, "none.jinja", "cannot be read")
    lines = rows.read_text().splitlines()
    system = {"role": "system", "content": "news"}
    messages = [system, *json.loads(lines[4])["messages"]]
    rows.write_text("\n".join([*lines[:4], json.dumps({"messages": messages}), *lines[5:]]))
    other = invoke("run", recipe, *out, "--set", f"task.chat_template={file}")
    refused(other, "train row 5, message 1", "system", "System role not supported")
    metrics = 'evaluation.metrics=["accuracy"]'
    refused(invoke("run", recipe, *out, "--set", metrics), "'accuracy' is about classes")


def test_a_template_file_is_part_of_the_run(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{# mine #}" + FAMILIES["qwen-2.5"].template)
    changes = ["--set", f"task.chat_template={file}", "--set", "evaluation.metrics=[]"]
    out = tmp_path / "run"
    assert invoke("run", recipe, "--out", out, *changes).exit_code == 0
    file.unlink()
    assert load_recipe(out / "recipe.json").task.chat_template.startswith("{# mine #}")
    assert invoke("evaluate", out).exit_code == 0


def test_free_text_is_written_up_to_a_new_line(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("q,a\n" + "".join(f"film {n},great\n" for n in range(40)))
    task = {"name": "custom", "source": str(tmp_path / "text.csv"), "prompt": "{q} It was"}
    changed = merged(data, evaluation={"every": 0})
    changed["task"] = {**task, "answer": "a"}
    path = tmp_path / "text.toml"
    path.write_text(toml_of(changed))
    shown = invoke("evaluate", data["model"]["name"], "--recipe", path, "--show", "3", "--json")
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert [answered["reference"] for answered in figures["answers"]] == ["great"] * 3
    assert not any("\n" in answered["answer"] for answered in figures["answers"])
