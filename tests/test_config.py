from __future__ import annotations

from pathlib import Path

import pytest

from mixlm.config import parse_config, read_config
from mixlm.errors import ConfigError

WHOLE = """
method = "conventional"
unit = "piece"
system = "Be brief."

[sampling]
top_k = 10

[[members]]
model = "one"
weight = 0.6
dtype = "float32"
device = "cpu"
[members.sampling]
temperature = 0.5

[[members]]
model = "two"
name = "second"
weight = 0.4
template = "{{ messages[0].content }}"
"""


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "e.toml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return file


def test_a_whole_file_is_read(write):
    config = read_config(write(WHOLE))
    assert (config.method, config.unit, config.system) == ("conventional", "piece", "Be brief.")
    assert config.sampling.options() == {"top_k": 10}
    first, second = config.members
    assert (first.model, first.weight, first.dtype, first.device) == ("one", 0.6, "float32", "cpu")
    assert first.sampling.options() == {"temperature": 0.5}
    assert (second.name, second.template) == ("second", "{{ messages[0].content }}")
    assert config.weights() == [0.6, 0.4]


def test_the_least_file_has_defaults(write):
    config = read_config(write('[[members]]\nmodel = "one"'))
    assert (config.method, config.unit, config.system, config.weights()) == ("mixture", "auto", None, None)
    assert config.members[0].dtype == config.members[0].device == "auto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "members is missing .*lists its"),
        ("members = []", "members.*at least 1"),
        ('[[members]]\nname = "x"', r"members\.0\.model is missing"),
        ('[[members]]\nmodel = "x"\nwieght = 1', r"unknown key 'members\.0\.wieght' .did you mean 'weight'"),
        ('methods = "x"\n[[members]]\nmodel = "x"', "unknown key 'methods' .did you mean 'method'"),
        (
            '[[members]]\nmodel = "x"\n[members.sampling]\ntopk = 1',
            r"unknown key 'members\.0\.sampling\.topk' .*'top_k'",
        ),
        ('[sampling]\ntemperatur = 1\n[[members]]\nmodel = "x"', r"unknown key 'sampling\.temperatur' .*'temperature'"),
        ('xyzzy = 1\n[[members]]\nmodel = "x"', "unknown key 'xyzzy' .known keys: members, method"),
        ('method = "mix"\n[[members]]\nmodel = "x"', "method is 'mix'.*'mixture'"),
        ('unit = "letter"\n[[members]]\nmodel = "x"', "unit is 'letter'.*'piece'"),
        ('[[members]]\nmodel = "x"\ndtype = "int8"', r"members\.0\.dtype is 'int8'.*'bfloat16'"),
        ('[[members]]\nmodel = "x"\nweight = "a lot"', r"members\.0\.weight is 'a lot'.*number"),
        ('[[members]]\nmodel = "x"\n[members.sampling]\ntop_p = 2', "top_p is 2.*at most 1"),
        ('[sampling]\ntemperature = -1\n[[members]]\nmodel = "x"', "temperature is -1.*0 or more"),
        ('[[members]]\nmodel = "x"\nweight = 1\n[[members]]\nmodel = "y"', "1 of 2 members have a weight"),
        ('[[members]]\nmodel = "x"\ndevice_map = 5', r"members\.0\.device_map is 5: "),
        ('[combination]\nstrength = 1.0\n[[members]]\nmodel = "x"', r"combination\.rule is missing .name one"),
        ('method = "single"\nrule = "max"\n[[members]]\nmodel = "x"', r"toml: method is 'single'.*rule is 'max'"),
        ("[[members", "is not valid TOML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_key_and_hint(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(text))


@pytest.mark.parametrize("text", ["", 'x = 1\n[[members]]\nmodel = "x"', "[[members"])
def test_a_refusal_names_the_file(write, text):
    path = write(text)
    with pytest.raises(ConfigError, match=path.name):
        read_config(path)


def test_a_missing_file_is_named_with_one_of_a_similar_name(write):
    path = write(WHOLE, "pair.toml")
    with pytest.raises(ConfigError, match=r"no ensemble file .*pairs\.toml .did you mean 'pair\.toml'"):
        read_config(path.with_name("pairs.toml"))
    with pytest.raises(ConfigError, match="no ensemble file"):
        read_config(path.parent / "nowhere" / "x.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "e.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        read_config(tmp_path / "e.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


def test_models_and_templates_are_found_beside_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    path = write('[[members]]\nmodel = "model"\ntemplate_file = "chat.jinja"\n[[members]]\nmodel = "elsewhere"')
    monkeypatch.chdir("/")
    first, second = read_config(path).members
    assert first.model == str(tmp_path / "model")
    assert first.template == "{{ messages }}"
    assert second.model == "elsewhere"


def test_a_template_is_given_once(write):
    with pytest.raises(ConfigError, match=r"e\.toml: member m has a template and a template_file"):
        read_config(write('[[members]]\nmodel = "m"\ntemplate = "x"\ntemplate_file = "e.toml"'))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, " cannot be read: No such file"),
        ("a\nb\ncaf\xe9 {{ x }}".encode("latin-1"), ", line 3: it is not UTF-8"),
        (b"{{ x }}\n\n{% for m in messages %}", ", line 3: "),
        (b"\n{{ messages | nonsense }}", ", line 2: No filter named 'nonsense'"),
        (b"{{ messages is nonsense }}", ", line 1: No test named 'nonsense'"),
        (b"{% generations %}", ", line 1: "),
    ],
)
def test_a_template_file_that_is_no_template_is_named_with_file_member_and_line(write, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    path = write('[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "m"\nname = "n"\ntemplate_file = "chat.jinja"')
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert raised.value.message.startswith(f"{path}: template_file chat.jinja of member n{reason}")


def test_a_configuration_cannot_be_changed(write):
    config = read_config(write(WHOLE))
    with pytest.raises(ValueError, match="frozen"):
        config.method = "greedy"


def test_what_is_parsed_names_its_source():
    with pytest.raises(ConfigError, match=r"^here: members is missing"):
        parse_config({}, "here")


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ('[members]\nmodel = "toy:1"', "[members] is one table", "write [[members]]"),
        ('members = ["toy:1"]', "members is a list of names", "write [[members]] for each"),
        ('[[members]]\nmodel = "toy:1"\nweight = "0.6"', "members.0.weight is '0.6'", "without quotes"),
        ('[[members]]\nmodel = "toy:1"\nslots = "4"', "members.0.slots is '4'", "without quotes"),
        ('[[members]]\nmodel = "toy:1"\nslots = true', "members.0.slots is True", None),
        ('[sampling]\ntop_k = "4"\n[[members]]\nmodel = "toy:1"', "sampling.top_k is '4'", "without quotes"),
        ('[[members]]\nmodel = "toy:1"\nmethod = "greedy"', "'members.0.method'", "above the first [table]"),
        ('temperature = 1\n[[members]]\nmodel = "toy:1"', "'temperature'", "below [sampling]"),
        ('[[members]]\nmodel = "toy:1"\ntop_k = 1', "'members.0.top_k'", "below [members.sampling]"),
        ('weight = 1\n[[members]]\nmodel = "toy:1"', "'weight'", "below [[members]]"),
        ('[[sampling]]\n[[members]]\nmodel = "toy:1"', "sampling is a list of tables", "write [sampling]"),
        ('[[members]]\nmodel = "toy:1"\n[[members.sampling]]', "members.0.sampling is a", "write [members.sampling]"),
        ('members = "toy:1"', "members is 'toy:1', and must be a list of tables", "write [[members]] for each"),
        ('[[models]]\nname = "toy:1"', "unknown key 'models'", "write [[members]] for each"),
        ('[member]\nmodel = "toy:1"', "unknown key 'member'", "write [[members]] for each"),
        ('[[members]]\nModel = "toy:1"', "unknown key 'members.0.Model'", "did you mean 'model'?"),
        ('[[members]]\npath = "toy:1"', "unknown key 'members.0.path'", "did you mean 'model'?"),
        ('weights = [1]\n[[members]]\nmodel = "toy:1"', "'weights'", "weight is a key of each member"),
        ('seed = 1\n[[members]]\nmodel = "toy:1"', "'seed'", "it is an option of each generation: --seed"),
        ('[sampling]\nmax_tokens = 1\n[[members]]\nmodel = "toy:1"', "'sampling.max_tokens'", "--max-tokens"),
        ('[[members]]\nmodel = "toy:1"\ndtype = "bf16"', "dtype is 'bf16'", "did you mean 'bfloat16'?"),
        ('[[members]]\nmodel = "toy:1"\ndevice = 0', "device is 0", "write it in quotes"),
        ('[[members]]\nmodel = "toy:1"\ntrust_remote_code = "true"', "trust_remote_code is 'true'", "without quotes"),
        ('router = "prompt"\n[[members]]\nmodel = "toy:1"', "router is 'prompt'", "write [router], and its keys"),
        ('[[members]]\nmodel = "toy:1"\nsampling = 5', "sampling is 5: it must be a table", "write [members.sampling]"),
        ('[[members]]\nmodel = "toy:1"\nweight = -1', "members.0.weight is -1", None),
        ('[[members]]\nmodel = "toy:1"\nweight = nan', "members.0.weight is nan", None),
        (
            '[router]\nsharpness = 4\n[[members]]\nmodel = "toy:1"',
            "sharpness applies only to the router of kind",
            None,
        ),
        ("[[members]]\nmodel = toy:1", "is not valid TOML: Invalid value (at line 2", 'texts stand in "quotes"'),
        ('[[members]]\nmodel = "toy:1"\ntemplate = """\n{% if %}"""', "template of member toy:1, line 1: ", "Jinja"),
    ],
)
def test_each_slip_in_a_file_has_a_hint_of_its_own(tmp_path, text, reason, hint):
    path = tmp_path / "pair.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert reason in raised.value.message
    assert (hint or "") in (raised.value.hint or "")


def test_what_is_no_file_in_toml_is_told_from_a_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\xff")
    (tmp_path / "e.toml").write_bytes(b"a = 1\nb = '\xff'")
    for path in ("toy:1", tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(ConfigError) as raised:
            read_config(path)
        assert raised.value.hint == "an ensemble file is text in TOML; a model is named with -m"
    with pytest.raises(ConfigError, match=r"e\.toml, line 2: it is not UTF-8 .*save it as UTF-8"):
        read_config(tmp_path / "e.toml")


def test_a_model_without_a_name_is_not_the_folder_of_the_file(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text('[[members]]\nmodel = ""')
    assert read_config(path).members[0].model == ""


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text('\ufeff[[members]]\nmodel = "toy:1"')
    assert read_config(path).members[0].model == "toy:1"


def test_a_template_of_transformers_is_valid(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text(
        "[[members]]\nmodel = 'toy:1'\ntemplate = '''{% for m in messages %}{% generation %}{{ m }}"
        "{% endgeneration %}{% break %}{% endfor %}'''\n"
    )
    assert read_config(path).members[0].template is not None
