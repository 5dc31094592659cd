"""What a run is worth in one number: a formula over metrics, by which settings are searched and a champion is chosen.

    score: harmonic_mean(learned, kept)
    score: 0.7 * concept/all + 0.3 * base_kept/all - max(0, 'held_out_loss' - 1)

Names are metrics, or roles, which mean the metric that speaks for them (`learned`, `kept`, `loss`, `followed`). A `/` without spaces
belongs to a metric's name; what divides has a space on both sides. What is in quotes is a metric's name whatever it is. More is better,
so a loss is subtracted. A formula is read by a parser that knows numbers, names, four functions and + - * / ( ), and nothing is run.

Without one it is the harmonic mean of what was learned and kept, where both are shares that every run measured; else the first of
CRITERIA that every run measured. The held-out loss comes last but one: it misled in our own studies.
"""

import ast
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from t2ilib.config import ConfigError, did_you_mean
from t2ilib.evaluation.metrics import Metric

CRITERIA = ("learned", "kept", "loss", "followed")
"""Roles of metrics, in the order in which they may decide; of each the first metric that every run measured."""
TOGETHER = Metric("learned and kept together", "share", "higher")
"""The harmonic mean of both shares, as F1 is of precision and recall: it is 0 for what learned nothing, however much
it kept."""


def together(shares: Sequence[float]) -> float:
    """Their harmonic mean. Less than nothing learned or kept, such as pictures less like the held-out ones than the base's are, counts as
    nothing."""
    return statistics.harmonic_mean([max(share, 0.0) for share in shares])


FUNCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "harmonic_mean": together,
    "min": min,
    "max": max,
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
NAME_WITH_SLASH = re.compile(r"""'[^']*'|"[^"]*"|[A-Za-z_]\w*(?:/\w[\w-]*)+""")
"""What Python's grammar would take for a division; quoted text is passed over."""


@dataclass(frozen=True)
class Formula:
    """`names`: what it says of metrics and roles, in its order; those of `quoted` are metrics whatever they are called."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]
    quoted: frozenset[str]


def parse_formula(text: str) -> Formula:
    """Reads a formula; raises ConfigError with what is not understood, and with what may be written."""
    quoted = NAME_WITH_SLASH.sub(lambda found: found[0] if found[0][0] in "'\"" else repr(found[0]), text)
    try:
        tree = ast.parse(quoted.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ConfigError(f"score {text!r} is no formula: {HELP}") from None
    names: dict[str, bool] = {}
    check(tree, text, names)
    if not names:
        raise ConfigError(f"score {text!r} names no metric, so that all runs would be worth the same: {HELP}")
    return Formula(text, tree, tuple(names), frozenset(name for name, plain in names.items() if not plain))


HELP = f"write metrics (concept/all), roles ({', '.join(CRITERIA)}), numbers, + - * /, and {', '.join(FUNCTIONS)} of several in ( )"


def check(node: ast.expr, text: str, names: dict[str, bool]) -> None:
    """Raises ConfigError for a part that is not of the language; puts what is named into `names`: whether it is a plain word."""
    match node:
        case ast.Constant(value=str() as name):
            names[name] = False
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            pass
        case ast.Name(id=name) if name not in FUNCTIONS:
            names.setdefault(name, True)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            check(left, text, names)
            check(right, text, names)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            check(operand, text, names)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as parts, keywords=[]):
            if name not in FUNCTIONS:
                raise ConfigError(
                    f"score {text!r}: there is no function {name}; choose {', '.join(FUNCTIONS)}.{did_you_mean(name, FUNCTIONS)}"
                )
            for part in parts:
                check(part, text, names)
        case _:
            raise ConfigError(f"score {text!r}: {ast.unparse(node)} is not understood: {HELP}")


def compute(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=str() as name) | ast.Name(id=name):
            return values[name]
        case ast.Constant(value=number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](compute(left, values), compute(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](compute(operand, values))
        case ast.Call(func=ast.Name(id=name), args=parts):
            return float(FUNCTIONS[name]([compute(part, values) for part in parts]))
    raise AssertionError(f"check() let {ast.dump(node)} pass")


@dataclass(frozen=True)
class Score:
    """How runs of a study are scored: by `metric`, which is made of `parts`, metrics that they measured. `meant`: name in the formula ->
    metric."""

    metric: Metric
    parts: tuple[str, ...]
    formula: Formula
    meant: Mapping[str, str]

    def of(self, metrics: Mapping[str, float]) -> float:
        """The score of a run that measured these; raises ConfigError for one that did not measure all, and for what has no value."""
        if lacking := [name for name in self.parts if name not in metrics]:
            raise ConfigError(f"score {self.formula.text!r}: a run did not measure {', '.join(lacking)}")
        values = {name: metrics[metric] for name, metric in self.meant.items()}
        try:
            return compute(self.formula.tree, values)
        except (ZeroDivisionError, statistics.StatisticsError) as error:
            told = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            raise ConfigError(f"score {self.formula.text!r} has no value where {told}: {error}") from None


def criteria(results: Sequence[Mapping[str, float]], declared: Mapping[str, Metric]) -> dict[str, str]:
    """Role -> metric, in the order of CRITERIA, of those that every run measured."""
    found = {}
    for role in CRITERIA:
        named = [key for key, metric in declared.items() if metric.role == role and metric.better]
        everywhere = [key for key in named if all(key in metrics for metrics in results)]
        if everywhere:
            found[role] = everywhere[0]
    return found


def scoring(
    results: Sequence[Mapping[str, float]], declared: Mapping[str, Metric], formula: str | None = None
) -> Score | None:
    """How runs that measured `results` are scored: by `formula`, or by the rule; None where the rule finds nothing that decides.

    Raises ConfigError for a formula that names what a run did not measure.
    """
    deciding = criteria(results, declared) if results else {}
    if formula is not None:
        return by_formula(parse_formula(formula), results, declared, deciding)
    parts = [deciding[role] for role in ("learned", "kept") if role in deciding]
    if len(parts) == 2 and all((declared[key].unit, declared[key].better) == ("share", "higher") for key in parts):
        meant = dict(zip(("learned", "kept"), parts, strict=True))
        return Score(TOGETHER, tuple(parts), parse_formula("harmonic_mean(learned, kept)"), meant)
    key = next(iter(deciding.values()), None)
    return key and Score(declared[key], (key,), parse_formula(repr(key)), {key: key})


def by_formula(
    formula: Formula,
    results: Sequence[Mapping[str, float]],
    declared: Mapping[str, Metric],
    deciding: Mapping[str, str],
) -> Score:
    everywhere = set.intersection(*(set(metrics) for metrics in results)) if results else set()
    meant = {name: name if name in formula.quoted else deciding.get(name, name) for name in formula.names}
    for name, metric in meant.items():
        if metric not in everywhere:
            known = ", ".join(sorted(name for name in everywhere if name in declared)) or "none"
            what = "no metric of this role was" if name in CRITERIA else "it was not"
            hint = did_you_mean(metric, everywhere)
            raise ConfigError(
                f"score {formula.text!r}: {name}: {what} measured by every run; measured were {known}.{hint}"
            )
    units = {(declared[key].unit, declared[key].better) if key in declared else None for key in meant.values()}
    plain = not any(isinstance(node, ast.BinOp | ast.UnaryOp) for node in ast.walk(formula.tree))
    unit = "share" if plain and units == {("share", "higher")} else "score"
    return Score(Metric(formula.text, unit, "higher"), tuple(dict.fromkeys(meant.values())), formula, meant)
