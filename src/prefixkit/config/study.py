"""A study, written down: arms that differ in a few settings, and claims to hold against what comes out."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from prefixkit.config.section import Section

_HERE = "{}"
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(pattern=r"^[^/\\]*[^/\\.\s][^/\\]*$", max_length=60)]


class Size(StrEnum):
    """How much of a study is run; what a size sets stands in ``studies/sizes.yaml``."""

    TINY = "tiny"
    TEACHING = "teaching"
    FULL = "full"


class ClaimTest(StrEnum):
    """How a claim is held against the arms' values of a measure."""

    BETTER = "better"
    ORDERED = "ordered"
    RATIO = "ratio"
    SPREAD = "spread"
    VALUE = "value"
    NONE = "none"


_ARMS = {
    ClaimTest.BETTER: (2, 2), ClaimTest.ORDERED: (2, None), ClaimTest.RATIO: (2, 2),
    ClaimTest.SPREAD: (2, None), ClaimTest.VALUE: (1, None),
}  # fmt: skip
_BOUNDED = {ClaimTest.RATIO, ClaimTest.SPREAD, ClaimTest.VALUE}


class ArmConfig(Section):
    """One way to train that a study compares with others; with `each`, several at once."""

    name: Name
    """What tables call it; {} stands for each value of `each`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What it sets in the recipe, such as prefix.num_virtual_tokens: 50; {} likewise."""
    each: list[str | int | float] | None = Field(None, min_length=1)
    """One arm per value; a number is its place on the axis."""
    recipe: str | None = None
    """Another recipe than the study's, where arms are tasks; ``--recipe`` leaves it alone."""
    x: float | None = Field(None, allow_inf_nan=False)
    """Its place on the axis of `axis`; left out, it has none and is drawn as a line across."""
    rates: list[Factor] | None = Field(None, min_length=1)
    """Factors on its own default learning rates to try instead of the study's."""

    def expanded(self) -> list["ArmConfig"]:
        """Return the arms it stands for."""
        if self.each is None:
            return [self]
        return [
            self.model_copy(
                update={
                    "name": self.name.replace(_HERE, str(value)),
                    "settings": {key: _fill(setting, value) for key, setting in self.settings.items()},
                    "each": None,
                    "x": float(value) if isinstance(value, int | float) else None,
                }
            )
            for value in self.each
        ]


class ClaimConfig(Section):
    """What somebody claims, and how it is tested here."""

    source: str
    """Who claims it and where, such as the lab page's section."""
    says: str
    """The claim in one sentence."""
    test: ClaimTest = Field(strict=False)
    """better: the first arm beats the second, or is behind by no more than `margin`; ordered: each arm beats the next;
    ratio: of the first arm's value to the second's, between low and high; spread: of the arms' greatest mean over their
    least, less one, between low and high; value: of the one arm, or the share of several arms' runs that diverged,
    between low and high; none: cannot be tested, for the reason why."""
    measure: str = "heldout_nll"
    """A key of scores.json, or seconds, peak_memory_bytes, flops_per_token, rollbacks or diverged; left out, the
    study's."""
    arms: list[str] = Field(default_factory=list)
    """Names of the arms it is about."""
    low: float | None = Field(None, allow_inf_nan=False)
    """Least value that agrees with the claim."""
    high: float | None = Field(None, allow_inf_nan=False)
    """Greatest value that does."""
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    """For test better: by how much the first arm may be behind, where the claim is that it does as well."""
    why: str = ""
    """For test none: the reason. Otherwise what a reader should know about the test."""
    beyond: str = ""
    """What scale or data would settle it."""

    @model_validator(mode="after")
    def _has_what_its_test_reads(self) -> "ClaimConfig":
        if self.test is ClaimTest.NONE:
            if not self.why:
                raise ValueError("test none needs why, the reason it cannot be tested")
            return self
        least, most = _ARMS[self.test]
        if len(self.arms) < least or (most is not None and len(self.arms) > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            raise ValueError(f"test {self.test} needs {wanted} arms, got {len(self.arms)}")
        if self.test in _BOUNDED and self.low is None and self.high is None:
            raise ValueError(f"test {self.test} needs low, high or both")
        if self.test not in _BOUNDED and (self.low is not None or self.high is not None):
            raise ValueError(f"test {self.test} reads neither low nor high; leave them out")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g})")
        if self.margin and self.test is not ClaimTest.BETTER:
            raise ValueError(f"margin is for test better, and the test is {self.test}")
        return self


class ClaimedTable(Section):
    """Numbers somebody published for the arms, shown beside the measured ones."""

    source: str
    """Who, where, and on what."""
    values: dict[str, dict[str, Annotated[float, Field(allow_inf_nan=False)]]]
    """Per arm, values by measure, in the units of scores.json and run.json (shares, seconds, bytes)."""


class StudyConfig(Section):
    """A study. What it leaves open has the defaults of its recipe."""

    name: Name
    """Name of the study and of its folder under studies/."""
    title: str
    """A few words for the top of a page."""
    question: str
    """What it asks, in one or two sentences."""
    recipe: str = "positive-reviews"
    """The recipe of all arms that have none of their own; ``--recipe`` takes another."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What all arms set in it, behind what the size sets."""
    arms: list[ArmConfig]
    """What is compared."""
    measure: str = "heldout_nll"
    """What the plot shows, and what claims are about that name no measure of their own."""
    seeds: int = Field(3, ge=1)
    """Training seeds per arm."""
    subsets: int = Field(1, ge=1)
    """Draws of the training rows (data.subset_seed), each with every seed."""
    rates: list[Factor] = Field(default_factory=lambda: [0.3, 1.0, 3.0], min_length=1)
    """Factors on each arm's own default learning rates; the one with the lowest validation loss of the first seed is
    used for all seeds. A single one is used as it is."""
    extensions: int = Field(1, ge=0)
    """How often the factors reach further where the best one is the last or the first."""
    axis: str = ""
    """What `x` counts; left out, arms are drawn side by side."""
    is_log: bool = True
    """Whether the axis is logarithmic."""
    claimed: ClaimedTable | None = None
    """Published numbers for the arms."""
    claims: list[ClaimConfig] = Field(default_factory=list)
    """What is tested."""
    beyond: str = ""
    """What a larger scale would settle that a small one cannot."""

    @model_validator(mode="before")
    @classmethod
    def _claims_are_about_its_measure(cls, values: Any) -> Any:
        claims = values.get("claims") if isinstance(values, dict) else None
        if not isinstance(claims, list) or "measure" not in values:
            return values
        own = {"measure": values["measure"]}
        return values | {"claims": [own | claim if isinstance(claim, dict) else claim for claim in claims]}

    @model_validator(mode="after")
    def _names_agree(self) -> "StudyConfig":
        arms = self.expanded_arms()
        names = [arm.name for arm in arms]
        for name, rates in [("rates", self.rates), *((f"arm {arm.name}: rates", arm.rates or []) for arm in arms)]:
            if len(set(rates)) < len(rates):
                raise ValueError(f"{name} names a factor twice: {rates}")
        for arm in arms:
            if any(_HERE in str(value) for value in (arm.name, *arm.settings.values())):
                raise ValueError(f"arm {arm.name}: {{}} stands for each of `each`, and there is none")
        if len(names) < 2:
            raise ValueError(f"arms: there is nothing to compare, expected at least 2, got {len(names)}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'arms: two are called "{name}"; give each its own name')
        for claim in self.claims:
            if claim.test is ClaimTest.VALUE and len(claim.arms) > 1 and claim.measure != "diverged":
                raise ValueError(f"test value of several arms is of diverged, not {claim.measure}; name one arm")
        named = {arm for claim in self.claims for arm in claim.arms} | set(self.claimed.values if self.claimed else ())
        if unknown := sorted(named - set(names)):
            raise ValueError(f'"{unknown[0]}" is claimed about, but no arm is called so; arms: {", ".join(names)}')
        return self

    def expanded_arms(self) -> list[ArmConfig]:
        """Return every arm, those of `each` one by one."""
        return [arm for written in self.arms for arm in written.expanded()]


def _fill(setting: Any, value: str | int | float) -> Any:
    """Put one of `each` into a setting: itself where nothing else stands there, written out inside a text."""
    if setting == _HERE:
        return value
    if isinstance(setting, list):
        return [_fill(each, value) for each in setting]
    return setting.replace(_HERE, str(value)) if isinstance(setting, str) else setting
