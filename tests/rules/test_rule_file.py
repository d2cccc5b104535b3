"""What a rules file may say: errors name file, line, the wrong word and the mend, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.rules.load import load_rules, preset_names
from amp_convert.rules.rule_file import parse_rule_file
from amp_convert.rules.rule_set import Place
from tests.growth import assert_linear

RULE = '[[rule]]\nop = "aten.linear"\ncategory = "allow"\nreason = "r"\n'


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rule(target: str, pattern: str, category: str, reason: str = "r", **more: str) -> str:
    lines = {target: pattern, "category": category, "reason": reason, **more}
    return "[[rule]]\n" + "".join(f"{key} = '{value}'\n" for key, value in lines.items())


def test_what_only_looks_like_a_header_does_not_move_the_lines(tmp_path: Path) -> None:
    text = (
        "# [[rule]]\n"
        '[[ rule ]]  # reason = "x"\n'
        'op = "aten.mm"\n'
        'category = "allow"\n'
        'reason = """a \\""" quote\n'
        "[[rule]]\n"
        '"""\n'
        "  [[rule]]\n"
        "op = 'aten.bmm'\n"
        "category = 'allow'\n"
        "reason = '''\n"
        "[[rule]] it's\n"
        "'''\n"
        "[[rule]]\n"
        'op = "aten.linear"  # "\n'
        "category = 'deny'\n"
        'reason = "# [[rule]]"\n'
    )
    rules = load_rules([write(tmp_path / "my.toml", text)]).rules
    assert [r.source for r in rules] == ["my.toml:2", "my.toml:8", "my.toml:14"]
    assert [r.reason for r in rules] == ['a """ quote [[rule]]', "[[rule]] it's", "# [[rule]]"]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbf" + RULE.replace("\n", "\r\n").encode())
    assert load_rules([str(tmp_path / "my.toml")]).rules[0].source == "my.toml:1"


TAIL = "category = 'deny'\nreason = 'r'\n"
ONE_TARGET = "Give it one of op, ops, layer, module or node."
REFUSED = {
    "extend = 'fp32'": "unknown top-level key 'extend' (at {f}:1). Did you mean 'extends'?",
    "\n[guard]": "unknown top-level key 'guard' (at {f}:2). Did you mean 'guards'?",
    "painting = 'autocat'": "unknown painting 'autocat' (at {f}:1). Known: autocast, grappler.",
    "painting = 7": "unknown painting '7' (at {f}:1). Known: autocast, grappler.",
    "extends = 3": "`extends` is not a name (at {f}:1). "
    "Write a preset's name, a path, or a list of those.",
    "extends = 'defualt'": "unknown preset 'defualt' (at {f}:1). Did you mean 'default'?",
    "extends = 'zzz'": "unknown preset 'zzz' (at {f}:1). Known: {presets}.",
    "\nextends = 'a\\u0000.toml'\n".replace("'", '"'): "unknown preset 'a\\x00.toml' (at {f}:2). "
    "Known: {presets}.",
    "[rule]\nop = 'aten.mm'\n" + TAIL: "`rule` is not a list of tables (at {f}:1). "
    "Write every rule under its own [[rule]] line.",
    "\nrule = [{op = 'aten.mm'}]": "`rule` is not a list of tables (at {f}:2). "
    "Write every rule under its own [[rule]] line.",
    RULE + "[[rule]]\n" + TAIL: "a rule has 0 targets (at {f}:5). " + ONE_TARGET,
    "[[rule]]\nop = 'aten.mm'\nlayer = 'a'\n" + TAIL: "a rule has 2 targets (at {f}:1). "
    + ONE_TARGET,
    "[[rule]]\nop = 'aten.mm'\ncategory = 'deny'\n": "a rule has no `reason` (at {f}:1). "
    "Add a line `reason = ...`.",
    "[[rule]]\nop = 'aten.mm'\nreason = 'r'\n": "a rule has no `category` (at {f}:1). "
    "Add a line `category = ...`.",
    "[[rule]]\nop = 'aten.mm'\ncategory = 'deny'\nreason = ' '\n": "`reason` is not a text "
    "(at {f}:4). Write a string that is not empty.",
    "[[rule]]\nlayer = ''\n" + TAIL: "`layer` is not a text (at {f}:2). "
    "Write a string that is not empty.",
    "[[rule]]\nop = ['aten.mm']\n" + TAIL: "`op` is not a text (at {f}:2). "
    "Write a string that is not empty.",
    "[[rule]]\nops = 'aten.mm'\n" + TAIL: "`ops` is not a list of operators (at {f}:2). "
    'Write a list of operators, such as ["aten.linear", "aten.mm"].',
    "[[rule]]\nops = []\n" + TAIL: "`ops` is not a list of operators (at {f}:2). "
    'Write a list of operators, such as ["aten.linear", "aten.mm"].',
    "[[rule]]\nops = ['aten.mm', 'aten.liner']\n" + TAIL: "unknown op 'aten.liner' (at {f}:2). "
    "Did you mean 'aten.linear'?",
    "[[rule]]\nop = 'aten.mm'\nops = ['aten.bmm']\n" + TAIL: "a rule has 2 targets (at {f}:1). "
    + ONE_TARGET,
    RULE + "\n" + RULE.replace("allow", "alow"): "unknown category 'alow' (at {f}:8). "
    "Did you mean 'allow'?",
    RULE + "catgory = 'deny'\n" + RULE: "unknown key in a rule 'catgory' (at {f}:5). "
    "Did you mean 'category'?",
    RULE + "dtype = 'fp16'\n": "unknown dtype 'fp16' (at {f}:5). Known: bfloat16, float16.",
    RULE + "device = 'gpu'\n": "unknown device 'gpu' (at {f}:5). Known: cpu, cuda.",
    RULE.replace("linear", "liner"): "unknown op 'aten.liner' (at {f}:2). "
    "Did you mean 'aten.linear'?",
    RULE.replace("aten.", ""): "unknown op 'linear' (at {f}:2). Did you mean 'aten.linear'?",
    RULE.replace("aten.", "aten::"): "unknown op 'aten::linear' (at {f}:2). "
    "Did you mean 'aten.linear'?",
    RULE.replace("aten.", "torch.nn.functional."): "unknown op 'torch.nn.functional.linear' "
    "(at {f}:2). Did you mean 'aten.linear'?",
    RULE.replace("aten.linear", "aten.zzzzzzzz"): "unknown op 'aten.zzzzzzzz' (at {f}:2). "
    "Write it as in torch.ops, such as 'aten.linear'.",
    RULE.replace("linear", "pow.Tensor_Skalar"): "unknown overload 'aten.pow.Tensor_Skalar' "
    "(at {f}:2). Did you mean 'aten.pow.Tensor_Scalar'?",
    RULE.replace("linear", "fftt_*"): "unknown op 'aten.fftt_*' (at {f}:2). "
    "Did you mean 'aten.fft_fft'?",
    RULE.replace("aten.linear", "operator.getitm"): "unknown op 'operator.getitm' (at {f}:2). "
    "Did you mean 'operator.getitem'?",
    RULE + "[guards]\nactivation_headrom = 1.0\n": "unknown guard 'activation_headrom' "
    "(at {f}:6). Did you mean 'activation_headroom'?",
    "guards = 3": "`guards` is not a table (at {f}:1). Write [guards], or guards = false.",
    "[guards]\nweight_headroom = 0\n": "guard `weight_headroom` has the value 0 (at {f}:2). "
    "Write a number above 0, or false to switch it off.",
    "[guards]\n\nweight_headroom = true\n": "guard `weight_headroom` has the value True "
    "(at {f}:3). Write a number above 0, or false to switch it off.",
    "[guards]\nweight_headroom = nan\n": "guard `weight_headroom` has the value nan (at {f}:2). "
    "Write a number above 0, or false to switch it off.",
    "a = 1\nb = [1\nc = 2\n": "not TOML: unclosed array (at {f}:3). Mend the text there.",
    "a = 1\nb = '''\n": "not TOML: expected \"'''\" (at {f}:3). Mend the text there.",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "my.toml", text)
    with pytest.raises(UsageError) as caught:
        load_rules([file])
    assert str(caught.value) == REFUSED[text].format(f=file, presets=", ".join(preset_names()))
    assert caught.value.exit_code == 2


def test_ops_of_libraries_that_are_not_imported_yet_are_taken_as_they_are(tmp_path: Path) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("op", "mylib.scan", "deny", "mine"))])
    found = rules.match_op(Place("float16", "cpu", "eval"), "mylib.scan.default")
    assert found is rules.rules[0]


def test_deep_nesting_is_refused_not_a_crash(tmp_path: Path) -> None:
    file = write(tmp_path / "deep.toml", "a = " + "[" * 100_000)
    with pytest.raises(UsageError, match=r"^not TOML: "):
        load_rules([file])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[guards]\nactivation_headroom = " + "9" * 4_000, "guard `activation_headroom` has the"),
        ("[guards]\nactivation_headroom = " + "9" * 5_000, "a number of thousands of digits"),
        ("a = " + "{b." * 100_000, "not TOML: "),
        (".".join("a" * 20_000) + " = 1", "line 1 has a key of more than 16 parts"),
        ("a" * 100_000 + " = 1", "unknown top-level key"),
        ('"\\u001b[2J\\n::error::" = 1', r"unknown top-level key '\x1b[2J\n::error::'"),
    ],
    ids=range(6),
)
def test_hostile_text_is_one_short_line(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_rule_file(text, "mine.toml")
    assert said in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 900


def test_unfinished_strings_take_linear_time() -> None:
    """Each of them could reach to the end of the text."""

    def read(count: int) -> None:
        with pytest.raises(UsageError, match=r"not TOML: .* \(at mine\.toml:2\)"):
            parse_rule_file('# why\na = """' + '"""\\' * count, "mine.toml")
        with pytest.raises(UsageError, match=r"not TOML: .* \(at mine\.toml:3\)"):
            parse_rule_file('# why\na = """\n' + '\\"""' * count, "mine.toml")

    assert_linear(read, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["#{}", "{} = 1", "{}"], ids=["comment", "key", "blank"])
def test_a_long_line_takes_linear_time(line: str) -> None:
    def read(count: int) -> None:
        text = line.format((" " if line == "{}" else "x") * count)
        with pytest.raises(UsageError, match="unknown"):
            parse_rule_file(f"{text}\nguards.more = 1\n", "mine.toml")

    assert_linear(read, 20_000)


@pytest.mark.slow
def test_many_operators_under_a_long_comment_take_linear_time() -> None:
    def read(count: int) -> None:
        ops = ", ".join(["'aten.linear'"] * count)
        text = "[[rule]]\n# why\n" + "# more\n" * count + f"ops = [{ops}]\n"
        file = parse_rule_file(text + "category = 'allow'\nreason = 'fast'\n", "mine.toml")
        assert len(file.rules) == count

    assert_linear(read, 2_000)
