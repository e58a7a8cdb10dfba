"""A folder of Hugging Face's library becomes a run and a run such a folder, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface
import pytest
import torch
from huggingface import CASES, Made
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosetrainer.checkpoint.export import whole_layers
from rosetrainer.checkpoint.huggingface.families import model_of, written_as
from rosetrainer.checkpoint.huggingface.load import find_weights
from rosetrainer.checkpoint.huggingface.write import write_folder
from rosetrainer.checkpoint.manifest import check_files, read_manifest
from rosetrainer.commands.convert import main
from rosetrainer.config import ConfigError, GPTConfig
from rosetrainer.data.bpe import BPETokenizer


def there_and_back(folder: Path, work: Path, *flags: str) -> Path:
    assert main(["from-hf", str(folder), str(work / "run")]) == 0
    assert main(["to-hf", str(work / "run"), str(work / "back"), *flags]) == 0
    return work / "back"


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def read_by_the_library(folder: Path) -> Any:
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not found[problem], f"{problem}: {found[problem]}"
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_and_the_library_reads_it(
    case: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = there_and_back(made(case), tmp_path)
    theirs = load_file(made(case) / "model.safetensors")
    assert_same(load_file(back / "model.safetensors"), theirs)
    found = huggingface.computed(read_by_the_library(back))
    expected = torch.load(made(case) / "float32.pt", weights_only=True)
    assert torch.equal(found["logits"], expected["logits"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'run'}: {len(theirs)} tensors of {made(case)}, ")
    assert said[1] == (
        f"{made(case)} has no tokenizer.json: prompts and texts of this run are numbers"
    )
    assert len(said) == 3
    step = tmp_path / "run" / "step_000000"
    check_files(step, read_manifest(step))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_short_dtype_is_read_into_fp32_and_comes_back(dtype: str, tmp_path: Path) -> None:
    model = huggingface.build("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "short")
    back = there_and_back(tmp_path / "short", tmp_path, "--dtype", dtype)
    theirs = load_file(tmp_path / "short" / "model.safetensors")
    assert {tensor.dtype for tensor in theirs.values()} == {getattr(torch, dtype)}
    assert_same(load_file(back / "model.safetensors"), theirs)
    assert read_by_the_library(back).dtype == getattr(torch, dtype)
    held = load_file(tmp_path / "run" / "step_000000" / "rank_00000.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}


def test_shards_with_an_index_are_read_and_written(made: Made, tmp_path: Path) -> None:
    huggingface.build("glm").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "theirs" / "model.safetensors").exists()
    main(["from-hf", str(tmp_path / "theirs"), str(tmp_path / "run")])
    step = tmp_path / "run" / "step_000000"
    manifest = read_manifest(step)
    config, specs = model_of(tmp_path / "theirs"), whole_layers(step, manifest)
    weights = find_weights(tmp_path / "theirs", config)
    (out := tmp_path / "ours").mkdir()

    def whole(name: str) -> Tensor:
        return weights.read_whole(name).reshape(specs[name].dense_shape)

    write_folder(out, config, specs, whole, torch.float32, most_bytes=20_000)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    together = {n: t for file in files for n, t in load_file(file).items()}
    assert_same(together, {n: t for file in shards for n, t in load_file(file).items()})
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    read_by_the_library(out)


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the folder with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def with_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def test_what_version_4_wrote_is_read_alike(made: Made, tmp_path: Path) -> None:
    """The rotary base beside the other keys, and `torch_dtype`."""
    for case, fraction in (("llama-attention-bias", {}), ("glm", {"partial_rotary_factor": 0.5})):
        old = shutil.copytree(made(case), tmp_path / case)
        base = json.loads((old / "config.json").read_text())["rope_parameters"]["rope_theta"]
        new = {"rope_parameters": ..., "dtype": ..., "torch_dtype": "float32"}
        with_config(old, rope_theta=base, rope_scaling=None, **new, **fraction)
        assert model_of(old) == model_of(made(case))
        assert model_of(old).rotary_base in (50.0, 300.0)


def test_an_old_gpt2_has_masks_and_no_prefix_and_a_copy_of_the_head(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def age(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    old = changed(made("gpt2"), tmp_path / "old", age)
    back = there_and_back(old, tmp_path)
    theirs = load_file(made("gpt2") / "model.safetensors")
    assert_same(load_file(back / "model.safetensors"), theirs)
    said = capsys.readouterr().out
    assert "not read, as they follow from others: h.0.attn.bias and 2 more" in said


def test_an_old_bert_has_other_names_and_tensors_without_a_place(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def age(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(32)[None]
        tensors["bert.pooler.dense.weight"] = torch.ones(40, 40)
        tensors["cls.seq_relationship.bias"] = torch.ones(2)
        tensors["cls.predictions.decoder.weight"] = torch.ones(61, 40)
        tensors["cls.predictions.decoder.bias"] = torch.ones(61)

    old = changed(made("bert"), tmp_path / "old", age)
    back = there_and_back(old, tmp_path)
    theirs = load_file(made("bert") / "model.safetensors")
    assert_same(load_file(back / "model.safetensors"), theirs)
    said = capsys.readouterr().out.splitlines()
    assert said[1:3] == [
        "not read, as they follow from others: bert.embeddings.position_ids and 2 more",
        "not read, as our model has no place for them: bert.pooler.dense.weight and 1 more",
    ]


def test_a_part_of_a_head_is_no_head(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without all of it, it begins with random numbers; a part of it is a mistake."""

    def behead(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("cls."):
                del tensors[name]

    headless = changed(made("bert"), tmp_path / "headless", behead)
    back = there_and_back(headless, tmp_path)
    assert "not in the folder, so random: output_head.bias and 4 more" in capsys.readouterr().out
    found, theirs = (load_file(f / "model.safetensors") for f in (back, made("bert")))
    assert found.keys() == theirs.keys()
    assert 0.05 < float(found["cls.predictions.transform.dense.weight"].std()) < 0.5
    part = changed(made("bert"), tmp_path / "part", lambda t: t.pop("cls.predictions.bias"))
    with pytest.raises(ConfigError, match=r"lacks the tensor cls.predictions.bias \(61,\)"):
        main(["from-hf", str(part), str(tmp_path / "other")])


def test_the_tokenizer_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    tokenizer = BPETokenizer.train("to be or not to be " * 40, 262, end_of_text=True)
    size = {"vocab_size": tokenizer.vocab_size}
    config = transformers.GPT2Config(**{**huggingface.GPT2, **size})
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    back = there_and_back(tmp_path / "theirs", tmp_path)
    content = (tmp_path / "theirs" / "tokenizer.json").read_bytes()
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    assert (back / "tokenizer.json").read_bytes() == content
    assert "numbers" not in capsys.readouterr().out
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert meta == {"tokenizer": "bpe", "end_of_text": tokenizer.end_of_text, **size}
    written = json.loads((back / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert written[name] == tokenizer.end_of_text == 261


def test_a_tokenizer_that_is_not_the_model_s_is_left_out(made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made("gpt2"), tmp_path / "copy")
    BPETokenizer.train("to be or not to be " * 40, 262).save(copy)
    back = there_and_back(copy, tmp_path)
    assert not (back / "tokenizer.json").exists()


def test_no_model_of_theirs_is_one_line(tmp_path: Path) -> None:
    plain = GPTConfig(architecture="llama", bias=False, tied=False)
    assert written_as(plain)[0] == "llama"
    for changes, said in (
        ({"norm": "layernorm"}, "norm=layernorm"),
        ({"activation": "relu2"}, "activation"),
        ({"qk_norm": True, "rotary_fraction": 0.5}, "rotary_fraction=0.5"),
    ):
        with pytest.raises(ConfigError, match=f"computes {said}.* of this one") as caught:
            written_as(GPTConfig(architecture="llama", bias=False, tied=False, **changes))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="computes bias=False of this one"):
        written_as(GPTConfig(bias=False))
    with pytest.raises(ConfigError, match="computes tied=False of this one"):
        written_as(GPTConfig(architecture="bert", tied=False))
    with pytest.raises(ConfigError, match="computes architecture=glm of this one"):
        written_as(GPTConfig(architecture="glm"))
    with pytest.raises(ConfigError, match="architecture=rotary"):
        written_as(GPTConfig(architecture="rotary", tied=False))


def bad(name: str, folder: Path) -> None:
    """Makes the folder what its name says."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if name == "unsupported":
        with_config(folder, model_type="bloom")
    elif name == "no-type":
        with_config(folder, model_type=...)
    elif name == "no-size":
        with_config(folder, hidden_size=...)
    elif name == "wrong-size":
        with_config(folder, hidden_size="wide")
    elif name == "other-size":
        with_config(folder, intermediate_size=64)
    elif name == "scaled":
        scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
        with_config(folder, rope_parameters=scaled)
    elif name == "window":
        with_config(folder, model_type="mistral", sliding_window=16)
    elif name == "activation":
        with_config(folder, hidden_act="tanh")
    elif name == "quantised":
        with_config(folder, quantization_config={"quant_method": "gptq"})
    elif name == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif name == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif name == "nothing":
        weights.unlink()
    elif name == "no-config":
        (folder / "config.json").unlink()
    elif name == "cut-off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif name == "missing-shard":
        weights.unlink()
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    elif name == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD = {
    "unsupported": "config.json: model_type='bloom' is not supported; it can be gpt2, llama, "
    "mistral, qwen2, qwen3, glm, bert or t5",
    "no-type": "config.json: model_type=None is not supported; it can be gpt2, ",
    "no-size": "config.json lacks hidden_size; was it written by hand?",
    "wrong-size": "config.json: d_model='wide' must be an integer",
    "other-size": "shape (56, 40), and the model needs (64, 40); do the flags or config.json ",
    "scaled": "config.json: rope_type='llama3' is not supported; only plain rotary positions are",
    "window": "config.json: sliding_window=16 is below max_position_embeddings=32, and attention ",
    "activation": "config.json: hidden_act='tanh' is not supported; it can be silu, gelu, ",
    "quantised": "the weights are quantised (quantization_config), and only plain ones are read; ",
    "adapter": "is an adapter (adapter_config.json), the difference to another model; merge it ",
    "pickle": "holds pytorch_model.bin, a pickle, which can run anything when it is read, so it is",
    "nothing": "has no model.safetensors and no model.safetensors.index.json; give a folder that ",
    "no-config": "config.json cannot be read: No such file or directory; give a folder that ",
    "cut-off": "model.safetensors cannot be read: ",
    "missing-shard": "lacks model-00001-of-00002.safetensors, which model.safetensors.index.json ",
    "outside": "model.safetensors.index.json does not name the file of each tensor",
}
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(DOWN), f"lacks the tensor {DOWN} (40, 56), which the model of"),
    "unexpected": (
        lambda t: t.update(odd=torch.zeros(3)),
        "holds odd (3,), for which the model of ",
    ),
    "wrong-shape": (
        lambda t: t.update({DOWN: torch.zeros(56, 40)}),
        f"{DOWN} has shape (56, 40), and the model needs (40, 56); do the flags or config.json",
    ),
    "integers": (
        lambda t: t.update({DOWN: torch.zeros(40, 56, dtype=torch.int8)}),
        f"{DOWN} is I8, as quantised weights are; only F64, F32, BF16 or F16 are read",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_TENSORS])
def test_a_folder_that_is_no_such_checkpoint_is_one_line(
    name: str, made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    if name in BAD:
        shutil.copytree(made("llama"), folder)
        bad(name, folder)
        message = BAD[name]
    else:
        change, message = BAD_TENSORS[name]
        changed(made("llama"), folder, change)
    with pytest.raises(ConfigError) as caught:
        main(["from-hf", str(folder), str(tmp_path / "run")])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_in_use_is_left_as_it_is(made: Made, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="run is there and not empty; name a new folder"):
        main(["from-hf", str(made("llama")), str(tmp_path / "run")])
    with pytest.raises(ConfigError, match="invalid choice: 'from'"):
        main(["from", "here"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_write_that_fails_leaves_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rosetrainer.checkpoint.huggingface.run_from.write_safetensors", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        main(["from-hf", str(made("llama")), str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def test_the_files_hold_no_more_than_weights(made: Made, tmp_path: Path) -> None:
    back = there_and_back(made("qwen3"), tmp_path)
    assert {path.name for path in back.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(back / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
