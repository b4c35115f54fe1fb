"""Which layer gets which dtypes: presets, rules by path and by class, every way to make a model."""

import threading

import keras
import pytest
from keras import layers
from tests.keras.policies.models import INPUTS, Net, attention, functional, is_plain, names, sequential

import duotone.keras as dk
from duotone.errors import PolicyError


def dtype_of(value) -> str:
    return keras.backend.standardize_dtype(value.dtype)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("fp32", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("bf16-mixed", "mixed_bfloat16"),
        ("mixed_float16", "mixed_float16"),
        ("p=f32,c=bf16", "mixed_bfloat16"),
    ],
)
def test_a_preset_is_keras_policy_of_every_layer_but_norms_and_softmax(text, plain):
    with dk.policy(text):
        model = sequential()
    norm = plain if plain in ("float32", "mixed_bfloat16", "mixed_float16") else f"mixed_{plain}"
    assert names(model) == {"hidden": plain, "norm": norm, "head": plain, "probabilities": "float32"}
    hidden, normed = model.layers[0], model.layers[1]
    assert dtype_of(hidden.kernel) == keras.DTypePolicy(plain).variable_dtype
    assert {dtype_of(variable) for variable in normed.variables} == {"float32"}
    assert dtype_of(model(INPUTS)) == "float32"
    assert is_plain(model)


@pytest.mark.parametrize("head", ["head", "net.head", "net/head", "h*d", "*head", "type=Dense"])
def test_a_rule_finds_layers_by_path_with_or_without_the_model_and_by_class(head):
    with dk.policy(f"bf16; {head}: float32"):
        model = sequential()
    assert names(model)["head"] == "float32"
    assert names(model)["hidden"] == ("float32" if head == "type=Dense" else "bfloat16")


def test_the_last_rule_that_sets_a_role_wins():
    with dk.policy("bf16; head: bf16-mixed; type=Dense: float32; hidden: bf16"):
        model = sequential()
    assert (names(model)["hidden"], names(model)["head"]) == ("bfloat16", "float32")
    with dk.policy("bf16; type=Dense: float32; head: bf16-mixed"):
        assert names(sequential())["head"] == "mixed_bfloat16"


def test_a_rule_wins_over_what_is_safe():
    with dk.policy("fp16; type=Softmax: compute=float16; norm: fp16"):
        model = sequential()
    assert names(model)["probabilities"] == "mixed_float16"
    assert names(model)["norm"] == "float16"


def test_a_class_is_found_by_its_bases_and_a_rule_holds_for_what_is_inside():
    with dk.policy("bf16; type=MultiHeadAttention: float32; type=RNN: float32"):
        model = attention()
    found = names(model)
    assert {name for path, name in found.items() if path.startswith("attention/")} == {"float32"}
    assert found["both_ways/forward_lstm/lstm_cell"] == found["both_ways/backward_lstm/lstm_cell"] == "float32"
    assert found["both_ways"] == "bfloat16"


def test_layers_inside_attention_and_recurrent_layers_follow_rules():
    with dk.policy("bf16; *.query: float32; attention/softmax*: float32"):
        model = attention()
    found = names(model)
    assert found["attention/query"] == "float32"
    assert found["attention/key"] == "bfloat16"
    assert {layer.dtype_policy.name for layer in model._flatten_layers() if isinstance(layer, layers.Softmax)} == {
        "float32"
    }
    # orthogonal matrices come from a QR factorization, which has no 16-bit kernel on torch and JAX
    assert found["both_ways/forward_lstm/lstm_cell"] == "mixed_bfloat16"
    assert is_plain(model)


def test_a_functional_model_has_the_dtypes_in_its_graph_that_it_has_when_it_runs():
    with dk.policy("fp16; both: float32"):
        model = functional()
    assert names(model) == {
        "left": "float16",
        "right": "float16",
        "both": "float32",
        "norm": "mixed_float16",
        "head": "float16",
    }
    assert model.get_layer("both").output.dtype == "float32"
    assert model.outputs[0].dtype == dtype_of(model(INPUTS)) == "float16"


def test_a_model_that_is_built_by_its_first_call_after_the_block_follows_the_rules():
    with dk.policy("bf16; block1: float32; net/block0/dense: bf16-mixed"):
        model = Net()
    assert dtype_of(model(INPUTS)) == "bfloat16"
    assert names(model) == {
        "block0": "bfloat16",
        "block0/norm": "mixed_bfloat16",
        "block0/dense": "mixed_bfloat16",
        "block1": "float32",
        "block1/norm": "float32",
        "block1/dense": "float32",
        "head": "bfloat16",
    }
    assert is_plain(model)


def test_a_rule_for_the_output_is_fp32_arithmetic_of_the_layer_itself():
    with dk.policy("fp16; head: output=float32"):
        assert names(sequential())["head"] == "float32"
    with dk.policy("fp16; block0: output=float32"):
        model = Net()
    with pytest.raises(PolicyError, match=r'holds for net\.block0, which has layers inside.*write "block0: float32"'):
        model(INPUTS)


def test_the_policy_can_be_the_global_one_and_one_layers():
    keras.config.set_dtype_policy(dk.policy("bf16; head: float32"))
    assert names(sequential())["head"] == "float32"
    keras.config.set_dtype_policy("float32")
    layer = layers.Dense(2, dtype=dk.policy("fp16"))
    assert dtype_of(layer(INPUTS)) == "float16"
    assert layer.dtype_policy == keras.DTypePolicy("float16")


def test_a_layer_with_a_dtype_of_its_own_keeps_it():
    with dk.policy("bf16"):
        layer = layers.Dense(2, dtype="float32")
        layer(INPUTS)
    assert layer.dtype_policy.name == "float32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16; haed: float32", 'rule "haed: .*" holds for no layer that was made without a dtype.*did you mean head'),
        ("bf16; type=Dens: float32", "did you mean type=Dense"),
        ("bf16; left.right: float32", "holds for no layer"),
    ],
)
def test_a_rule_that_holds_for_no_layer_names_what_is_nearest(text, message):
    with pytest.raises(PolicyError, match=message), dk.policy(text):
        functional()
    assert keras.config.dtype_policy().name == "float32"


def test_such_a_rule_for_a_model_that_is_not_built_is_found_by_its_first_call():
    with dk.policy("bf16; haed: float32"):
        model = Net()
    with pytest.raises(PolicyError, match="did you mean head"):
        model(INPUTS)


def test_such_a_rule_is_found_by_fit_whose_first_try_to_build_a_model_may_fail_in_silence():
    with dk.policy("bf16; haed: float32"):
        model = Net()
    model.compile("sgd", "mse", run_eagerly=True)
    for _ in range(2):
        with pytest.raises(PolicyError, match="did you mean head"):
            model.fit(INPUTS, INPUTS[:, :3], verbose=0)


def test_a_rule_has_to_hold_in_each_block_of_one_policy():
    policy = dk.policy("bf16; head: float32")
    with policy:
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    with pytest.raises(PolicyError, match="did you mean"), policy:
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="haed")])


def test_a_block_that_makes_no_layer_has_no_rule_that_holds():
    with pytest.raises(PolicyError, match="no layer was built"), dk.policy("bf16; head: float32"):
        pass


def test_a_rule_for_a_model_whose_layers_were_built_before_it_is_refused():
    with dk.policy("fp16; encoder: float32"):
        inputs = keras.Input((4,))
        encoder = keras.Model(inputs, layers.Dense(3, name="inside")(inputs), name="encoder")
        with pytest.raises(PolicyError, match=r"holds for the model encoder, but .* such as inside in float16"):
            encoder(keras.Input((4,)))


def test_a_body_that_raises_leaves_the_policy_that_was_there():
    keras.config.set_dtype_policy("mixed_bfloat16")
    with pytest.raises(KeyError), dk.policy("fp16; nothing: float32"):
        raise KeyError
    assert keras.config.dtype_policy() == keras.DTypePolicy("mixed_bfloat16")


def test_blocks_nest_and_threads_have_their_own():
    outer = dk.policy("fp16")
    seen = []
    with outer, dk.policy("bf16"), outer:
        worker = threading.Thread(target=lambda: seen.append(keras.config.dtype_policy().name))
        worker.start()
        worker.join()
        assert keras.config.dtype_policy() is outer
    assert seen == ["float32"]
    assert keras.config.dtype_policy().name == "float32"


def test_two_threads_can_use_one_policy():
    shared = dk.policy("fp16")
    gate = threading.Barrier(2)
    left = []

    def use() -> None:
        with shared:
            gate.wait()
        gate.wait()
        left.append(keras.config.dtype_policy().name)

    workers = [threading.Thread(target=use) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert left == ["float32", "float32"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16,inputs=float32", "Keras has no inputs=float32; each layer casts"),
        ("bf16,reduce=bfloat16", "Keras has no reduce=bfloat16; replicas reduce"),
        ("bf16,state=bfloat16", "Keras has no state=bfloat16; the moments"),
        ("bf16,frozen=tail", "Keras has no frozen=tail; "),
        ("bf16,grad=float32", "Keras has no grad=float32 for bfloat16 variables; .* write grad=bfloat16"),
        ("bf16,compute=e4m3", 'Keras has no compute=float8_e4m3fn; .*quantize\\("float8"\\)'),
        ("bf16-true,rounding=stochastic", "Keras has no rounding=stochastic; keep masters"),
        ("fp16,output=bf16", "Keras has no output=bfloat16 beside compute=float16"),
        ("bf16; head: residual=compute", 'Keras has no residual=compute in rule "head'),
        ("bf16; head: compute=bf16,output=float32", "beside compute=bfloat16; a layer returns what it computes in"),
        ("bf16; head: grad=float32", "Keras has no grad=float32 in rule"),
        ("fp17", "neither a preset"),
    ],
)
def test_what_keras_cannot_have_is_refused(text, message):
    with pytest.raises(PolicyError, match=message):
        dk.policy(text)


def test_rules_that_do_not_fit_each_other_are_refused_where_they_meet():
    with (
        pytest.raises(PolicyError, match='layer "left" under rules that say compute=float32'),
        dk.policy("fp16; left: compute=float32"),
    ):
        functional()
