"""The main table and the curves of a study: lists of measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from immunonet._words import show
from immunonet.evaluation.bench import Part
from immunonet.evaluation.lab import Lab, Measured, Measurement, Tables
from immunonet.studies.entries import Comparison
from immunonet.studies.model import Study


@dataclass(frozen=True)
class Run:
    """A study at work on the tables of a lab; `models`: the names of the bases' networks.

    `looking`: nothing is done yet, so that what is to be chosen first, and is not kept, is as its description has it.
    """

    study: Study
    tables: Tables
    seed: int
    models: dict[str, str]
    looking: bool = False

    @property
    def lab(self) -> Lab:
        """The tables' lab."""
        return self.tables.lab

    def choosing(self, m: Measurement) -> list[Part]:
        """Return what chooses the settings of a defence that is tuned."""
        return self.tables.choosing(m, self.study.tuned_on())

    def settled(self, m: Measurement) -> Measurement:
        """Return a measurement whose defence has chosen them."""
        if self.looking and any(self.tables.bench.kept(part) is None for part in self.choosing(m)):
            return m
        return self.tables.settled(m, self.study.tuned_on())


def wanted(run: Run) -> list[Measurement]:
    """Return all measurements of the main table and the curves, once each.

    ValueError for a defence that the network, or the number of examples, does not allow.
    """
    entries = [("main", entry) for entry in run.study.main] + [(entry.name, entry) for entry in run.study.curves]
    all_of_them = [m for name, entry in entries for m in _expanded(run, name, entry)]
    return [m for i, m in enumerate(all_of_them) if m not in all_of_them[:i]]


def _expanded(run: Run, name: str, entry: Comparison) -> Iterator[Measurement]:
    study, lab, vary = run.study, run.lab, getattr(entry, "vary", "")
    for base in entry.bases or study.bases:
        for candidates in entry.places() or [()]:
            for called in entry.defences:
                for value, settings in entry.varied():
                    if vary == "layers" and candidates != (value,):
                        continue
                    spec = study.spec(called, candidates[0] if candidates else (), settings)
                    size = value if vary == "repertoire" else entry.repertoire
                    known = lab.known(spec, base, size)
                    among = candidates if spec.layers else ()
                    told = {"model": run.models[base], "experiment": name, "title": spec.title}
                    for attack in entry.attacks:
                        at = " or ".join("+".join(one) for one in among)
                        words = (name, base, called, at, attack, f"{vary} {show(value)}" if vary else "")
                        yield Measurement(
                            spec=spec, base=base, among=among, repertoire=size if known.learns else None,
                            attack=attack, method=study.attack(attack, value if vary == "eps" else None),
                            split=entry.split, images=min(entry.images, len(lab.splits[entry.split])),
                            seeds=tuple(range(run.seed, run.seed + entry.seeds)) if known.randomised else (),
                            told=told | ({"vary": vary, "value": value} if vary else {}),
                            place=" ".join(filter(None, words)),
                        )  # fmt: skip


def measured(run: Run, measurements: Sequence[Measurement]) -> list[Measured]:
    """Return all that was measured, in turn, as what is fitted for one is used for the next."""
    run.tables.bench.ahead(part for m in measurements for part in run.choosing(m))
    run.tables.bench.ahead(part for m in measurements for part in run.tables.parts(run.settled(m)))
    return [done for m in measurements for done in run.tables.measure([run.settled(m)])]
