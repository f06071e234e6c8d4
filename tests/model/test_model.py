"""Configurations and models: what is obeyed, what is refused, and that no model sees what it is to predict."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch

from slimpajama_hf.errors import UserError
from slimpajama_hf.model import causality
from slimpajama_hf.model import presets as models
from tests.conftest import read_ledger, run_command, run_script

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    return load_tokenizer("builtin")


@pytest.fixture
def config_of(tokenizer, tmp_path):
    """The configuration of a config.json with these values, and overrides."""

    def make(values, overrides=None):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return models.model_config(str(path), overrides, tokenizer, 64)

    return make


# ---- master weights ----


@pytest.mark.parametrize("values", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_float32_whatever_a_file_says(config_of, tmp_path, values, name, dtype):
    model = models.build(config_of(values | {name: dtype}), 1)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    plain = models.build(config_of(values), 1)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "float32" and "torch_dtype" not in saved


def test_a_dtype_inside_a_configuration_is_none_of_ours_either(config_of):
    gemma = {"model_type": "gemma3", "dtype": "bfloat16", "text_config": {
        "model_type": "gemma3_text", "dtype": "bfloat16", "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 300,
    }, "vision_config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}}  # fmt: skip
    config = config_of(gemma)
    assert (config.dtype, config.text_config.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_no_override(tokenizer, name):
    with pytest.raises(UserError, match="--precision"):
        models.model_config("tiny", f"{name}=bfloat16", tokenizer, 64)


# ---- what sees ahead ----

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 64, "n_positions": 64, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "n_embd": 32, "n_layer": 2, "n_head": 2, "head_dim": 16, "embedding_size": 32, "num_local_experts": 4,
    "num_experts": 4, "moe_intermediate_size": 16, "state_size": 8, "rotary_dim": 8, "attention_hidden_size": 32,
    "num_experts_per_tok": 2,
}  # fmt: skip


def small(kind, **more):
    """Values of a small configuration of an architecture."""
    from transformers import CONFIG_MAPPING

    of_kind = CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(of_kind)}
    known = {name: value for name, value in SMALL.items() if name in names}
    return {"model_type": kind} | known | more


CAUSAL = ["gpt2", "llama", "qwen3", "gemma", "gemma2", "mistral", "mixtral", "qwen3_moe", "mamba", "gpt_neox", "opt",
          "bloom", "gptj", "falcon_mamba", "rwkv"]  # fmt: skip


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_is_built_and_draws_nothing_more(config_of, kind):
    from transformers import AutoModelForCausalLM, set_seed

    config = config_of(small(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.build(config, 3)
        after = torch.get_rng_state()
        set_seed(3)
        plain = AutoModelForCausalLM.from_config(config)
    assert torch.equal(after, torch.get_rng_state())
    assert model.training == plain.training
    for (name, one), two in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_model_with_dropout_is_looked_at_without_it(config_of):
    values = GPT2 | {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    assert models.build(config_of(values), 1).training


@pytest.mark.parametrize("kind", ["bert", "electra", "ernie", "roformer", "big_bird", "rembert", "megatron-bert"])
def test_a_model_that_sees_ahead_is_refused_with_what_helps(config_of, kind):
    with pytest.raises(UserError) as refused:
        models.build(config_of(small(kind)), 1)
    said = str(refused.value)
    assert f"{kind} as configured sees the future" in said
    # What it says to type has been tried, so it works; where it would not, it is not said.
    helps = "--config_overrides is_decoder=true" in said
    try:
        models.build(config_of(small(kind), "is_decoder=true"), 1)
        built = True
    except UserError as error:
        assert "sees the future" in str(error) and "choose another model" in str(error)
        built = False
    assert helps == built


def test_zeros_that_hide_what_is_seen_are_looked_through(config_of):
    from transformers import AutoModelForCausalLM

    blind = models.build(config_of(GPT2), 1)
    with torch.no_grad():
        blind.transformer.h[0].attn.c_proj.weight.zero_()
    assert causality.seen(blind)[1] == 0.0
    causality.refuse_what_sees_ahead(blind)
    # The same of one that sees ahead.
    model = AutoModelForCausalLM.from_config(config_of(small("bert")))
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense.weight.data.zero_()
    assert causality.seen(model) == (0.0, 0.0)
    with pytest.raises(UserError, match="bert as configured sees the future"):
        causality.refuse_what_sees_ahead(model)


def test_bert_as_a_decoder_is_a_causal_model(config_of):
    models.build(config_of(small("bert"), "is_decoder=true"), 1)


def test_a_model_that_cannot_be_run_is_refused(config_of):
    # RoBERTa counts its positions from its pad token, which no run has.
    with pytest.raises(UserError, match="a roberta model with this configuration cannot compute"):
        models.build(config_of(small("roberta")), 1)


@pytest.mark.parametrize("override", ["layer_norm_epsilon=-1.0", "initializer_range=1e30"])
def test_a_model_whose_logits_say_nothing_is_refused(tokenizer, override):
    config = models.model_config("tiny", f"n_layer=1,n_embd=32,n_head=2,{override}", tokenizer, 64)
    with pytest.raises(UserError, match="no finite numbers"):
        models.build(config, 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "t5"}, "no causal language model of the type t5"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        (GPT2 | {"n_layer": 0}, "n_layer is 0"),
        (GPT2 | {"n_layer": "two"}, "not a model configuration"),
    ],
)
def test_a_file_of_what_is_not_trained_is_refused(config_of, values, said):
    with pytest.raises(UserError, match=said):
        config_of(values)


# ---- overrides ----


def test_a_vocabulary_may_be_padded_and_not_cut(tokenizer, config_of):
    tokens = len(tokenizer)
    config = models.model_config("tiny", f"n_layer=1,vocab_size={tokens + 64}", tokenizer, 64)
    assert models.build(config, 1).get_output_embeddings().weight.shape[0] == tokens + 64
    with pytest.raises(UserError, match=f"the tokenizer has {tokens} tokens"):
        models.model_config("tiny", f"vocab_size={tokens - 1}", tokenizer, 64)
    assert config_of(GPT2 | {"vocab_size": tokens + 64}, f"vocab_size={tokens + 64}").vocab_size == tokens + 64


def test_a_vocabulary_of_a_file_gives_way_to_the_tokenizer_with_a_word(tokenizer, config_of, capsys):
    assert config_of(GPT2 | {"vocab_size": 50257}).vocab_size == len(tokenizer)
    said = capsys.readouterr().err
    assert "vocab_size is 4,096 here" in said and "--config_overrides vocab_size=50257 keeps it" in said


def test_ids_of_special_tokens_are_those_of_the_tokenizer(tokenizer):
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = models.model_config("tiny", f"eos_token_id={eos},bos_token_id={bos},pad_token_id=null", tokenizer, 64)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (eos, bos, None)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        with pytest.raises(UserError, match=f"{name}=77: the tokenizer's is"):
            models.model_config("tiny", f"{name}=77", tokenizer, 64)


#: Every field of GPT-2's configuration with a value that is odd: `None` is obeyed, a text is in the refusal.
ODD: dict[str, list[tuple[str, str | None]]] = {
    "transformers_version": [("5.0", "without effect")],
    "architectures": [("x", "without effect")],
    "output_hidden_states": [("true", "without effect"), ("3", "without effect")],
    "return_dict": [("false", "without effect")],
    "dtype": [("bfloat16", "--precision")],
    "chunk_size_feed_forward": [("3", "without effect")],
    "is_encoder_decoder": [("true", "without effect")],
    "id2label": [("x", "without effect")],
    "label2id": [("x", "without effect")],
    "problem_type": [("regression", "without effect")],
    "vocab_size": [("0", "has 4096 tokens|1 or more"), ("-1", "1 or more"), ("1e3", "whole number"), ("true", "whole")],
    "n_positions": [("0", "1 or more"), ("32", "longer than the model's 32 positions"), ("64", None)],
    "n_embd": [("0", "1 or more"), ("-8", "1 or more"), ("33", "divisible"), ("2.5", "whole number")],
    "n_layer": [("0", "1 or more"), ("-1", "1 or more"), ("true", "whole number"), ("two", "whole number")],
    "n_head": [("0", "1 or more"), ("3", "divisible"), ("-2", "1 or more"), ("null", "whole number")],
    "n_inner": [("0", "1 or more"), ("-1", "1 or more"), ("40", None), ("null", None), ("x", "whole number or null")],
    "activation_function": [("foo", "no such activation"), ("3", "a word"), ("relu", None)],
    "resid_pdrop": [("2", "between 0 and 1"), ("-1.0", "between 0 and 1"), ("x", "a number"), ("0.1", None)],
    "embd_pdrop": [("2.0", "between 0 and 1"), ("NaN", "finite"), ("true", "a number"), ("0", None)],
    "attn_pdrop": [("-0.5", "between 0 and 1"), ("Infinity", "finite"), ("0.1", None)],
    "layer_norm_epsilon": [("-1", "finite"), ("x", "a number"), ("1", None)],
    "initializer_range": [("-1", "above 0"), ("0", "above 0"), ("x", "a number"), ("0.5", None)],
    "summary_type": [("mean", "without effect")],
    "summary_use_proj": [("false", "without effect")],
    "summary_activation": [("tanh", "without effect")],
    "summary_proj_to_labels": [("false", "without effect")],
    "summary_first_dropout": [("0.5", "without effect")],
    "scale_attn_weights": [("false", None), ("1", "true or false")],
    "use_cache": [("false", "without effect"), ("true", None)],
    "bos_token_id": [("-1", "the tokenizer's is"), ("x", "whole number")],
    "eos_token_id": [("[1]", "the tokenizer's is"), ("x", "expected")],
    "pad_token_id": [("999999", "the tokenizer's is")],
    "scale_attn_by_inverse_layer_idx": [("true", None)],
    "reorder_and_upcast_attn": [("true", "without effect"), ("false", None)],
    "add_cross_attention": [("true", "without effect")],
    "tie_word_embeddings": [("false", None), ("x", "true or false")],
    # No fields of it.
    "n_ctx": [("64", "has no n_ctx")],
    "to_dict": [("1", "has no to_dict")],
    "model_type": [("llama", "has no model_type")],
    "attribute_map": [("1", "has no attribute_map")],
    "_name_or_path": [("x", "has no _name_or_path")],
    "_attn_implementation": [("eager", None), ("foo", "foo")],
}


def test_every_field_of_gpt2_is_tried():
    from transformers import GPT2Config

    assert {field.name for field in dataclasses.fields(GPT2Config)} <= set(ODD)


@pytest.mark.parametrize(("name", "value", "said"), [(name, *case) for name, cases in ODD.items() for case in cases])
def test_an_odd_override_is_obeyed_or_refused_in_a_sentence(tokenizer, name, value, said):
    sizes = {"n_layer": "1", "n_embd": "32", "n_head": "2", "n_positions": "64"} | {name: value}
    overrides = ",".join(f"{key}={each}" for key, each in sizes.items())

    def make():
        config = models.model_config("tiny", overrides, tokenizer, 64)
        return models.build(config, 1)

    if said is None:
        model = make()
        assert getattr(model.config, name) == models.parse_overrides(f"{name}={value}")[name]
    else:
        with pytest.raises(UserError, match=said) as refused:
            make()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 450


@pytest.mark.parametrize("overrides", ["n_layer=1,n_layer=2", "n_layer=1,num_hidden_layers=2"])
def test_a_field_is_not_given_twice(tokenizer, overrides):
    with pytest.raises(UserError, match="twice"):
        models.model_config("tiny", overrides, tokenizer, 64)


def test_what_follows_from_a_size_follows_from_an_override(config_of):
    config = config_of(LLAMA, "hidden_size=64")
    assert config.head_dim == 32


@pytest.mark.slow
def test_a_run_with_a_padded_vocabulary_is_whole(shards, tmp_path):
    """The model guesses ids that no token has; samples, passports, report and every command cope."""
    run = tmp_path / "run"
    # Untrained, with as many rows for nothing as for tokens: about half of what it writes is no token.
    flags = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=64,vocab_size=8192",
             "--max_seq_length", "64", "--dataset", f"{shards}/*.jsonl.zst", "--precision", "float32", "--eval_steps", "6",
             "--eval_dataset", f"{shards}/example_train_2.jsonl.zst", "--eval_documents", "4", "--display_samples", "2",
             "--learning_rate", "1e-6", "--output_dir", str(run)]  # fmt: skip
    done = run_script(*flags, "--max_steps", "6")
    assert done.returncode == 0, done.stderr
    assert "builtin, 4,096 tokens" in done.stderr and "its vocabulary padded to 8,192" in done.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["model"]["vocab_size"], record["tokenizer_size"]) == (8192, 4096)
    # The first token is one of the tokenizer's: ln 4096 nats, not ln 8192.
    for row in read_ledger(run):
        assert row["code_bits"] == pytest.approx((row["loss"] * (row["tokens"] - 1)) / math.log(2) + 12, rel=1e-6)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and not any("error" in sample for sample in samples)
    passports = [json.loads(line) for line in (run / "passports.jsonl").read_text().splitlines()]
    guessed = {int(token): text for entry in passports for token, text in entry.get("guesses", {}).items()}
    beyond = [token for token in guessed if token >= 4096]
    assert beyond and all(guessed[token] == f"<{token}>" for token in beyond)
    (evaluation,) = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    checked = run_command("verify", str(run))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    scored = run_command("evaluate", str(run), "--dataset", f"{shards}/example_train_2.jsonl.zst", "--documents", "4",
                         "--json")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    again = json.loads(scored.stdout)["scores"]["all"]["bits_per_byte"]
    assert again == pytest.approx(evaluation["scores"]["all"]["bits_per_byte"], rel=1e-5)
    written = run_command("generate", str(run), "--prompt", "The river")
    assert written.returncode == 0, written.stderr
    resumed = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "8")
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in read_ledger(run)] == list(range(8))
