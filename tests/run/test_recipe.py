from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import sparing
from sparing.core.errors import RequestError
from sparing.run.recipe import Train, Watch, available, difference, load, resolve

NAME = "language-dynmoe"
LEAST = {"task": {"name": "language"}, "train": {"tokens": 10_000}}


def write(path: Path, body: object) -> str:
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    return str(path)


# ---- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(available()))
@pytest.mark.parametrize("smoke", [False, True])
def test_shipped_recipes_resolve_and_survive_yaml(name, smoke):
    recipe = load(name, smoke=smoke)
    assert recipe.name == name
    assert recipe.about == available()[name]
    assert recipe.about
    assert recipe.smoke, "a recipe needs a form that runs in seconds"
    back = resolve(yaml.safe_load(recipe.to_yaml()))
    assert back == recipe
    assert back.to_yaml() == recipe.to_yaml()
    assert difference(back, recipe) is None
    for method, given in zip(recipe.build_methods(), recipe.methods.values(), strict=True):
        assert method.to_dict() == given
    assert recipe.build_task().name == recipe.task["name"]


def test_a_resolved_recipe_leaves_nothing_to_defaults(tmp_path):
    body = {"task": {"name": "language"}, "methods": {"dynmoe": {}}, "train": {"tokens": 5}}
    recipe = load(write(tmp_path / "mine.yaml", body))
    assert recipe.name == "mine"
    plain = recipe.to_dict()
    assert plain["train"]["optimizer"] == "adamw"
    expected = {"evaluate": 0.125, "checkpoint": 0.1, "log": 0.005, "start": False}
    assert plain["watch"] == expected
    assert plain["task"]["vocab"] == 256
    assert plain["task"]["domains"] == ["shakespeare", "gsm8k", "python"]
    assert plain["methods"]["dynmoe"]["adapt"]["every"] == 100
    assert plain["methods"]["dynmoe"] == sparing.TopAny().to_dict()


def test_smoke_settings_come_from_the_environment_and_before_overrides(monkeypatch):
    whole = load(NAME)
    monkeypatch.setenv("SPARING_SMOKE", "1")
    small = load(NAME)
    assert small == load(NAME, smoke=True) != whole
    assert small.train.tokens < whole.train.tokens
    assert load(NAME, ["train.tokens=20_000"]).train.tokens == 20_000
    assert load(NAME, smoke=False) == whole


def test_overrides():
    recipe = load(
        NAME,
        [
            "train.learning_rate=3e-3",
            "train.weight_decay=1E-1",
            "train.betas=[0.8, 0.99]",
            "train.clip=null",
            'train.rates={"*embed*": 2e-2}',
            "methods.dynmoe.adapt.every=7",
            "methods.dynmoe.adapt.add=never",
            "methods.dynmoe.losses.balance=1e-3",
            "task.domains=[gsm8k]",
            "seed=5",
            "name=1e3-tokens",
            "about=short",
        ],
    )
    train = recipe.train
    assert (train.learning_rate, train.weight_decay, train.clip) == (0.003, 0.1, None)
    assert train.betas == (0.8, 0.99)
    assert recipe.methods["dynmoe"]["adapt"]["every"] == 7
    assert recipe.methods["dynmoe"]["adapt"]["add"] == "never"
    assert recipe.methods["dynmoe"]["losses"]["balance"] == 0.001
    assert recipe.methods["dynmoe"]["target_k"] == load(NAME).methods["dynmoe"]["target_k"]
    assert recipe.task["domains"] == ("gsm8k",)
    assert (recipe.seed, recipe.name) == (5, "1e3-tokens")
    with pytest.raises(RequestError, match=r"recipe\.about: .* got None"):
        load(NAME, ["about=null"])


@pytest.mark.parametrize("given", ["price", "[price]"])
def test_one_name_is_a_list_of_one(given):
    made = load("clicks-cowclip", [f"task.numeric={given}", "task.path=log.csv"])
    assert made.task["numeric"] == ("price",)


def test_methods_come_and_go_by_override():
    assert load(NAME, ["methods.dynmoe=null"]).methods == {}
    assert load(NAME, ["methods.dynmoe=null"], smoke=True).methods == {}
    assert load(NAME, ["methods=null"]).methods == {}
    both = load(NAME, ["methods.dynmoe=null", "methods.top-k.k=1"])
    assert list(both.methods) == ["top-k"]
    assert both.methods["top-k"]["k"] == 1
    # a class's name is taken for the method's
    assert list(load(NAME, ["methods.dynmoe=null", "methods.TopK={}"]).methods) == ["top-k"]


def test_numbers_that_yaml_reads_as_text(tmp_path):
    text = "task: {name: language}\ntrain: {tokens: 1e4, learning_rate: 1e-3, rates: {a: 2E-2}}\n"
    train = load(write(tmp_path / "r.yml", text)).train
    assert (train.tokens, train.learning_rate, train.rates) == (10_000, 0.001, {"a": 0.02})


def test_difference_names_the_first_key():
    one = load(NAME)
    assert difference(one, load(NAME)) is None
    assert difference(one, load(NAME, ["seed=2"])) == "seed is 0 there and 2 here"
    told = difference(one, load(NAME, ["methods.dynmoe.adapt.every=9"]))
    assert told is not None
    assert told.startswith("methods.dynmoe.adapt.every is ")
    assert difference(one, load(NAME, ["methods=null"])) == (
        "methods.dynmoe is in one of them only"
    )


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.tokens=3", r'unknown key in recipe "trian"; did you mean "train"\?'),
        ("train.learning_rat=3", r'unknown key in recipe.train "learning_rat"; did you mean "lear'),
        ("watch.logs=1", r'unknown key in recipe.watch "logs"; did you mean "log"\?'),
        ("task.seqlen=3", r'unknown key in task "seqlen"; did you mean "seq_len"\?'),
        ("task.name=langauge", r'unknown task "langauge"; did you mean "language"\?'),
        ("task.domains=[shakespear]", r'task: unknown domain "shakespear"; did you mean "shakesp'),
        ("methods.dinmoe={}", r'unknown method "dinmoe"; did you mean "dynmoe"\?'),
        ("methods.dynmoe.target=2", r'unknown key in methods.dynmoe "target"; did you mean "targ'),
        ("methods.dynmoe.adapt.evry=2", r'key in methods.dynmoe.adapt "evry"; did you mean "every'),
        ("methods.dynmoe.losses.balnce=2", r'methods.dynmoe.losses "balnce"; did you mean "balan'),
        ("methods.dynmoe.max_experts=0", "methods.dynmoe: max_experts must be at least 1, got 0"),
        ("methods.dynmoe.adapt.every=0", r"methods\.dynmoe.*: every must be at least 1, got 0"),
        (
            "methods.dynmoe.weights=soft",
            r"methods\.dynmoe\.weights: .*'uniform'.*'soft'",
        ),
        ("methods.dynmoe=3", "methods.dynmoe.*mapping|dictionary"),
        ("methods=[dynmoe]", r"recipe.methods must be a mapping, got \['dynmoe'\]"),
        ("methods.TopAny={}", 'methods names "dynmoe" twice, once as "TopAny"; keep one'),
        ("task.vocab=300", "task: vocab 300 does not fit: tokens are bytes, set vocab to 256"),
        ("task.domains=[]", "task: domains is empty; name at least one of shakespeare"),
        ("task.domains=[gsm8k, gsm8k]", "names one twice"),
        ("task.seq_len=long", r"task\.seq_len: .*valid integer.*'long'"),
        ("task.dim=7", "task: dim 7 must be a multiple of heads"),
        ("task=language", "recipe.task: .*dictionary.*'language'"),
        ("train=null", r"recipe\.train: .*None"),
        ("train.tokens=null", "needs a budget: set train.tokens, train.epochs, or both"),
        ("train.tokens=0", "train.tokens must be at least 1, got 0"),
        ("train.tokens=ten", r"recipe\.train\.tokens: .*valid integer.*'ten'"),
        ("train.tokens=1.5", r"recipe\.train\.tokens: .*integer.*1\.5"),
        ("train.batch_size=-4", "train.batch_size must be at least 1, got -4"),
        ("train.epochs=0", "train.epochs must be at least 1, got 0"),
        ("train.learning_rate=0", "train.learning_rate must be above 0, got 0"),
        ("train.learning_rate=.nan", "train.learning_rate must be above 0, got nan"),
        ("train.muon_rate=-1", "train.muon_rate must be above 0, got -1"),
        ("train.rates={a: 0}", r'train.rates\["a"\] must be above 0, got 0'),
        ("train.warmup=2", r"train.warmup must be in \[0, 1\], got 2"),
        ("train.weight_decay=-0.1", "train.weight_decay must be at least 0, got -0.1"),
        ("train.clip=0", "train.clip must be above 0 or null, got 0"),
        ("train.betas=[0.9, 1.0]", r"train.betas must be in \[0, 1\), got \[0.9, 1.0\]"),
        ("train.optimizer=lion", r"recipe\.train\.optimizer: .*'muon', 'sgd' or 'rowwise'.*'lion'"),
        ("train.precision=fp8", r"recipe\.train\.precision: .*'fp8'"),
        ("watch.log=0", r"watch.log must be in \(0, 1\], got 0"),
        ("seed=-1", r"seed must be in \[0, 2\*\*32\), got -1"),
        ("seed=x", r"recipe\.seed: .*valid integer.*'x'"),
        ("train.tokens", 'an override is key=value, got "train.tokens"'),
        ("=3", 'an override is key=value, got "=3"'),
        ("train.tokens=[1", r'the value of "train.tokens=\[1" is not YAML'),
        ("train.tokens.x=1", '"train.tokens.x" goes below tokens, which is'),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(RequestError, match=message):
        load(NAME, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must be a mapping with task, methods and train"),
        ("a: [", "is not YAML"),
        ("train: {tokens: 5}", "task.name is missing; .*language"),
        ("task: {name: language}", r"recipe\.train: "),
        ("task: {name: language}\ntrain: {tokens: 5}\nmethods: 3", "methods must be a mapping"),
        ("task: {name: language}\ntrain: {tokens: 5}\n3: 4", 'unknown key in recipe "3"'),
        ("smoke: [a]\ntask: {name: language}\ntrain: {tokens: 5}", "smoke must be a mapping"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(RequestError, match=message):
        load(write(tmp_path / "r.yaml", text), smoke=True)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(RequestError, match=r'recipe "language-dynmo"; did you mean "language-dynm'):
        load("language-dynmo")
    with pytest.raises(RequestError, match=r"there is no recipe file nowhere\.yaml"):
        load("nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(RequestError, match="cannot be read"):
        load(str(tmp_path / "bytes.yaml"))


def test_python_users_are_told_the_same():
    with pytest.raises(RequestError, match="needs a budget"):
        Train()
    with pytest.raises(RequestError, match=r"watch.checkpoint must be in \(0, 1\], got 2"):
        Watch(checkpoint=2)
    with pytest.raises(RequestError, match=r'unknown key in recipe "tsk"; did you mean "task"\?'):
        resolve({**LEAST, "tsk": 1})


# ---- presets, and what is for comparisons --------------------------------------------------------


def test_a_preset_comes_before_smoke_and_overrides():
    assert load("language-dynmoe", preset="explore", smoke=False).train.tokens == 2_700_000
    assert load("language-dynmoe", preset="explore", smoke=True).train.tokens == 16_384
    chosen = load("language-dynmoe", ["train.tokens=5000"], preset="explore", smoke=False)
    assert chosen.train.tokens == 5000
    with pytest.raises(RequestError, match=r'unknown preset "explor"; did you mean "explore"'):
        load("language-dynmoe", preset="explor")


def test_a_run_is_made_of_the_recipe_without_its_arms():
    recipe = load("language-dynmoe", smoke=False)
    assert recipe.arms["dense"].match is not None
    assert recipe.compare is not None
    alone = recipe.alone()
    assert not {"arms", "compare", "presets"} & set(alone.to_dict())
    assert resolve(alone.to_dict()) == alone
    assert resolve(recipe.to_dict()) == recipe


def test_an_override_in_yaml_keeps_numbers():
    rates = '{"*embed*": 3e-2}'
    recipe = load("language-dynmoe", [f"train.rates={rates}"], smoke=False)
    assert recipe.train.rates == {"*embed*": 0.03}
