"""config.pbtxt: golden text, and Triton's own schema reads back what was meant."""

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from exporters.config_pbtxt import ModelConfig, Tensor, quote, render

tritonclient = pytest.importorskip("tritonclient.grpc")
from tritonclient.grpc import model_config_pb2  # noqa: E402

GOLDEN = """\
name: "echo"
backend: "python"
max_batch_size: 0
input {
  name: "text"
  data_type: TYPE_STRING
  dims: [ 1 ]
  optional: true
}
output {
  name: "frames"
  data_type: TYPE_UINT8
  dims: [ -1, 480, 720, 3 ]
}
instance_group {
  count: 2
  kind: KIND_CPU
}
model_transaction_policy {
  decoupled: true
}
parameters {
  key: "a"
  value { string_value: "say \\"hi\\"\\n" }
}
parameters {
  key: "b"
  value { string_value: "2" }
}
"""
ECHO = ModelConfig(
    name="echo",
    backend="python",
    inputs=(Tensor("text", "TYPE_STRING", optional=True),),
    outputs=(Tensor("frames", "TYPE_UINT8", (-1, 480, 720, 3)),),
    decoupled=True,
    instance_kind="KIND_CPU",
    instance_count=2,
    parameters={"b": "2", "a": 'say "hi"\n'},
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def parse(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_golden():
    assert render(ECHO) == GOLDEN


def test_parses_back():
    config = parse(render(ECHO))
    assert (config.name, config.backend, config.max_batch_size) == ("echo", "python", 0)
    assert config.input[0].optional and config.input[0].data_type == model_config_pb2.TYPE_STRING
    assert list(config.output[0].dims) == [-1, 480, 720, 3]
    assert config.instance_group[0].count == 2
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert config.model_transaction_policy.decoupled
    assert {key: value.string_value for key, value in config.parameters.items()} == ECHO.parameters


@given(key=TEXT, value=TEXT)
def test_any_text_survives(key, value):
    config = ModelConfig(name=value, backend="python", inputs=(), outputs=(), parameters={key: value})
    back = parse(render(config))
    assert back.name == value
    assert back.parameters[key].string_value == value


def test_a_value_cannot_add_fields():
    config = ModelConfig(name='x"\nmax_batch_size: 9', backend="python", inputs=(), outputs=())
    assert parse(render(config)).max_batch_size == 0


def test_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        quote("\ud800")


@pytest.mark.parametrize("bad", [{"data_type": "TYPE_TEXT"}, {"dims": ()}, {"dims": (0,)}, {"dims": (-2,)}])
def test_bad_tensor(bad):
    with pytest.raises(ValueError, match="tensor 'x'"):
        Tensor(**{"name": "x", "data_type": "TYPE_INT32", **bad})


def test_bad_instance_kind():
    with pytest.raises(ValueError, match="KIND_TPU"):
        ModelConfig("x", "python", (), (), instance_kind="KIND_TPU")
