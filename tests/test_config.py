"""Settings: every key by recipe and by `--set`, one clear sentence a mistake, and one definition for flags and keys."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

import mlx_distill
from mlx_distill import config as config_module
from mlx_distill.cli.main import COMMANDS, main
from mlx_distill.config import CollectConfig, TrainConfig
from mlx_distill.errors import ConfigError, InputError
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.settings import Settings, kinds_of, known_keys, parse_settings

MINIMAL = """
name = "mine"
[prompts]
file = "p.txt"
[collect]
teacher = "recorded:answers"
[compare]
prompts = "held.txt"
"""

GROUPS: list[type[Settings]] = [
    found
    for found in vars(config_module).values()
    if isinstance(found, type) and issubclass(found, Settings) and found is not Settings
]


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf of a recipe."""
    yield "name", Recipe.model_fields["name"]
    for section, field in Recipe.model_fields.items():
        if section != "name":
            (group,) = kinds_of(field.annotation)
            yield from ((f"{section}.{leaf}", found) for leaf, found in group.model_fields.items())


FIELDS = dict(fields())


#: Keys that are of use only with others.
TOGETHER: dict[str, dict[str, Any]] = {
    "train.distill": {"train.teacher_logits": "logits"},
    "train.teacher_logits": {"train.distill": "jsd"},
    "train.teacher_online": {"train.distill": "jsd"},
    "train.on_policy": {"train.distill": "jsd", "train.teacher_online": "mlx:teacher"},
    "compare.samples": {"compare.temperature": 0.5},
    "collect.judge": {"collect.choose": "best"},
    "collect.judge_url": {"collect.choose": "best"},
}


def other_value(key: str, field: FieldInfo) -> Any:
    """A value that the field may have, and does not have by itself, as JSON has it."""
    if key == "collect.batch_orphan":
        return "abandon"
    if key == "compare.repetition_penalty":
        return 1.25
    if key == "train.memory_limit":
        return "6.5GB"
    if key == "report.only":
        return "md,png"
    kind = next(kind for kind in kinds_of(field.annotation) if kind is not NoneType)
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    if kind is bool:
        return field.default is not True
    return {int: 7, float: 0.25, Path: f"some where/{key}", str: "other text".replace(" ", "-")}[kind]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def at(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    return found


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.message.removeprefix(f"{path}: ")


def test_there_are_settings_to_walk() -> None:
    assert len(FIELDS) > 50
    assert {"train.batch_size", "collect.accept_terms", "report.comparison"} <= FIELDS.keys()


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_can_be_set_on_the_command_line(recipe_file: Path, key: str) -> None:
    value = other_value(key, FIELDS[key])
    overrides = [f"{k}={json.dumps(v)}" for k, v in {key: value, **TOGETHER.get(key, {})}.items()]
    assert at(load_recipe(recipe_file, overrides), key) == value


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_can_be_set_in_a_recipe(tmp_path: Path, key: str) -> None:
    value = other_value(key, FIELDS[key])
    path = tmp_path / "recipe.toml"
    # Dotted keys at the top, so that the recipe's own sections can follow only where they do not clash.
    tree = {"name": "mine", "prompts.file": "p", "collect.teacher": "recorded:a", "compare.prompts": "h", key: value}
    tree |= TOGETHER.get(key, {})
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in tree.items()), encoding="utf-8")
    assert at(load_recipe(path), key) == value


@pytest.mark.parametrize("key", [key for key in FIELDS if str in kinds_of(FIELDS[key].annotation)])
@pytest.mark.parametrize("text", ["a b", "it's", 'say "hi"', "a = b", "x#y", "[1", "ü 漢 🙂", "tab\there", "a\nb = 3"])
def test_text_without_quotes_is_taken_as_it_is(recipe_file: Path, key: str, text: str) -> None:
    if key in ("name", "collect.batch_orphan", "train.memory_limit", "report.only"):
        assert "must be of the form" in refused(recipe_file, f"{key}={text}")
    else:
        more = [f"{k}={json.dumps(v)}" for k, v in TOGETHER.get(key, {}).items()]
        assert at(load_recipe(recipe_file, [f"{key}={text}", *more]), key) == text


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@examples(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quoted_text_comes_through(recipe_file: Path, text: str) -> None:
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    assert load_recipe(recipe_file, [f"collect.system={quoted}"]).collect.system == text


def test_a_value_of_several_lines_sets_one_key(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ['collect.system="x"\nteacher="anthropic:other"'])
    assert recipe.collect.teacher == "recorded:answers"
    assert recipe.collect.system == '"x"\nteacher="anthropic:other"'


def test_the_last_override_wins_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL + "[train]\nepochs = 9\nrank = 9\n", encoding="utf-8")
    recipe = load_recipe(path, ["train.epochs=1", "train.epochs=2"])
    assert (recipe.train.epochs, recipe.train.rank) == (2, 9)


def test_paths_follow_from_the_name(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["name=longer"])
    assert recipe.prompts.out == recipe.collect.prompts == Path("data/longer/prompts.jsonl")
    assert recipe.collect.out == recipe.train.data == Path("data/longer")
    assert recipe.train.run == recipe.fuse.run == recipe.compare.run == Path("adapters/longer")
    assert recipe.compare.out == recipe.judge.comparison == recipe.report.comparison == Path("visuals/longer")
    assert recipe.compare.teacher == recipe.collect.teacher
    assert recipe.compare.fused is recipe.fuse.out is None


def test_paths_follow_from_each_other(recipe_file: Path) -> None:
    changes = [
        "collect.out=d",
        "train.run=r",
        "fuse.out=f",
        "compare.out=c",
        "compare.teacher=mlx:m",
        "prompts.out=p.x",
    ]
    recipe = load_recipe(recipe_file, changes)
    assert (recipe.train.data, recipe.collect.prompts) == (Path("d"), Path("p.x"))
    assert recipe.fuse.run == recipe.compare.run == Path("r")
    assert recipe.compare.fused == Path("f")
    assert recipe.judge.comparison == recipe.report.comparison == Path("c")
    assert recipe.compare.teacher == "mlx:m"


def test_a_teachers_server_is_that_of_the_comparison_too_unless_that_has_another_teacher(recipe_file: Path) -> None:
    server = ["collect.teacher=openai:m", "collect.base_url=http://127.0.0.1:1/v1"]
    assert load_recipe(recipe_file, server).compare.base_url == "http://127.0.0.1:1/v1"
    assert load_recipe(recipe_file, [*server, "compare.teacher=recorded:d"]).compare.base_url is None
    assert load_recipe(recipe_file, [*server, "compare.base_url=u"]).compare.base_url == "u"
    assert load_recipe(recipe_file).compare.base_url is None


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("trian.rank", "trian (did you mean train?)"),
        ("jugde.judge", "jugde (did you mean judge?)"),
        ("nmae", "nmae (did you mean name?)"),
        ("train.rnak", "train.rnak (did you mean train.rank?)"),
        ("train.learning-rate", "train.learning-rate (did you mean train.learning_rate?)"),
        ("train.epoch", "train.epoch (did you mean train.epochs?)"),
        ("rank", "rank (did you mean train.rank?)"),
        ("epohcs", "epohcs (did you mean train.epochs?)"),
        # A key of another section rather than one that is merely like it here.
        ("collect.learning_rate", "collect.learning_rate (did you mean train.learning_rate?)"),
        # The same name stands in two sections: the one that is meant is the one in which it was misspelt.
        ("compare.batchsize", "compare.batchsize (did you mean compare.batch_size?)"),
        ("xyzzy", "xyzzy"),
        ("report.xyzzy", "report.xyzzy"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest(recipe_file: Path, key: str, guess: str) -> None:
    assert refused(recipe_file, f"{key}=3") == f"unknown key {guess}."


@pytest.mark.parametrize("section", ["", *(name for name in Recipe.model_fields if name != "name")])
def test_unknown_keys_are_refused_at_every_level(recipe_file: Path, section: str) -> None:
    key = f"{section}.no_such_key".removeprefix(".")
    assert f"unknown key {key}" in refused(recipe_file, f"{key}=3")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.layers=0", "train.layers = 0: must be above 0 or 'all'."),
        ("train.layers=foo", "train.layers = 'foo': must be a whole number or 'all'."),
        ("train.epochs=0", "train.epochs = 0: must be above 0."),
        ("train.epochs=1.5", "train.epochs = 1.5: must be a whole number."),
        ("train.epochs=true", "train.epochs = true: must be a number."),
        ("train.epochs=three", "train.epochs = 'three': must be a whole number."),
        ("train.learning_rate=inf", "train.learning_rate = inf: must be finite."),
        ("train.learning_rate=nan", "train.learning_rate = nan: must be finite."),
        ("train.dropout=1", "train.dropout = 1: must be below 1."),
        ("train.seed=-1", "train.seed = -1: must be at least 0."),
        ("train.seed=4294967296", "train.seed = 4294967296: must be below 4294967296."),
        ("train.warmup=false", "train.warmup = false: must be a number."),
        ("collect.concurrency=257", "collect.concurrency = 257: must be at most 256."),
        ("train.optimizer=sgd", "train.optimizer = 'sgd': must be 'adamw', 'adam', 'lion', 'adafactor' or 'muon'."),
        ("train.grad_clip=none", "train.grad_clip = 'none': must be a number."),
        ("train.rank={x = 1}", "train.rank = {'x': 1}: must be a whole number."),
        ("collect.accept_terms=maybe", "collect.accept_terms = 'maybe': must be true or false."),
        ("collect.system=1", "collect.system = 1: must be text, in quotes."),
        ("train.data=5", "train.data = 5: must be a path, in quotes."),
        # It decides the paths of four steps: the mistake is told where it was made, and once.
        ("train.run=5", "train.run = 5: must be a path, in quotes."),
        ("train.run=", "train.run = '': must be a path."),
        ('train.run="a\\u0000b"', "train.run = 'a\\x00b': must be a path."),
        ("name=../up", "name = '../up': must be of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$."),
        ("train=3", "train must be a section: [train]"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(recipe_file: Path, override: str, sentence: str) -> None:
    assert refused(recipe_file, override) == sentence


def test_all_mistakes_are_told_at_once(recipe_file: Path) -> None:
    assert refused(recipe_file, "train.rank=0", "train.epochs=0", "trian=1") == (
        "train.epochs = 0: must be above 0; train.rank = 0: must be above 0; unknown key trian (did you mean train?)."
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("", encoding="utf-8")
    assert refused(path) == (
        "name is required; prompts.file is required; collect.teacher is required; "
        "compare: nothing is asked: give prompts, eval, or both."
    )


@pytest.mark.parametrize("override", ["", "train.epochs", "=3", "train.=3", ".rank=3", "train..rank=3"])
def test_an_override_needs_a_key_and_a_value(recipe_file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE") as caught:
        load_recipe(recipe_file, [override])
    assert caught.value.hint == "For example:  --set train.epochs=3"


def test_a_value_is_not_a_section(recipe_file: Path) -> None:
    assert refused(recipe_file, "name.x=3") == "--set name.x=3: name is a value, not a section."


def test_invalid_toml_is_told_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n[train\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
    assert "line 2, column 7" in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(path).name == "mine"


def test_what_is_no_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe") as caught:
        load_recipe(tmp_path / "none.toml")
    assert caught.value.hint is not None and "--show-recipe" in caught.value.hint
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(tmp_path / "b.toml")


def test_the_demos_recipe_is_one() -> None:
    recipe = load_recipe(Path(mlx_distill.__file__).parents[1] / "data" / "recipes" / "demo.toml")
    assert (recipe.name, recipe.train.model, recipe.judge.judge) == ("demo", "smollm2-135m", "rubric")


def test_settings_are_frozen() -> None:
    train = TrainConfig(data=Path("d"), run=Path("r"))
    with pytest.raises(ValueError, match="frozen"):
        train.rank = 3  # type: ignore[misc]


def test_the_folder_of_a_collection_follows_from_the_prompt_file() -> None:
    settings = parse_settings(CollectConfig, {"prompts": "some/coding.toml", "teacher": "recorded:x"}, where="here")
    assert settings.out == Path("data/coding")


def test_known_keys_are_those_of_the_model() -> None:
    keys = set(known_keys(Recipe))
    assert keys - FIELDS.keys() == set(Recipe.model_fields) - {"name"}
    assert FIELDS.keys() <= keys


# One definition: what a command takes is what its settings have.


def commands_with_settings() -> dict[str, type[Settings]]:
    """By the name of the command: ImportAdapterConfig is import-adapter's."""
    names = {group: re.sub(r"(?<=[a-z])(?=[A-Z])", "-", group.__name__.removesuffix("Config")) for group in GROUPS}
    return {name.lower(): group for group, name in names.items()}


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_every_group_of_settings_is_a_command() -> None:
    assert commands_with_settings().keys() == COMMANDS.keys() - {"demo", "run"}
    assert {section for section in Recipe.model_fields if section != "name"} <= commands_with_settings().keys()


@pytest.mark.parametrize("name", commands_with_settings())
def test_flags_are_the_settings_and_nothing_else(name: str) -> None:
    group = commands_with_settings()[name]
    parameters = {str(parameter.name): parameter for parameter in command(name).params}
    assert parameters.keys() == {*group.model_fields, "as_json"}
    for key, field in group.model_fields.items():
        parameter = parameters[key]
        # No value of its own: the settings' default is the only one.
        assert parameter.default is None or parameter.to_info_dict()["default"] is None
        assert parameter.type is click.STRING or kinds_of(field.annotation) == (bool,)
        if isinstance(parameter, click.Option):
            assert f"--{key.replace('_', '-')}" in parameter.opts
            assert parameter.required == field.is_required()
            assert (parameter.help or "").startswith(field.description or "no description")
            if not (field.is_required() or field.default in (None, True, False, "") or field.default_factory):
                assert (parameter.help or "").endswith(f"[default: {field.default}]")
        else:
            assert field.json_schema_extra == {"argument": True}


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_is_described(key: str) -> None:
    assert FIELDS[key].description


def test_no_default_is_written_twice() -> None:
    """Outside of config/ no parameter or attribute named as a setting has a number or text of its own."""
    given = {key: field.default for key, field in FIELDS.items() if not field.is_required()}
    names = {key.rpartition(".")[2] for key, default in given.items() if default not in (None, True, False)}
    twice = []
    for path in sorted(Path(mlx_distill.__file__).parent.rglob("*.py")):
        if path.parent.name == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arguments):
                positional = [*node.posonlyargs, *node.args]
                pairs = list(zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True))
                pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
                named = [(argument.arg, default) for argument, default in pairs]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                named = [(node.target.id, node.value)]
            else:
                continue
            twice += [
                f"{path.name}:{default.lineno}: {name}"
                for name, default in named
                if name in names and isinstance(default, ast.Constant) and default.value not in (None, True, False)
            ]
    assert twice == []
