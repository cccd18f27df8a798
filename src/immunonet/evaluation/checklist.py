"""The checklist of Carlini et al. (2019), each item answered from what an evaluation did."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from immunonet.evaluation.outcome import Evaluation

SOURCE = "https://arxiv.org/abs/1902.06705"


class Item(NamedTuple):
    """An item of the checklist in short, the answer, and where on the page the evidence stands (an anchor or none)."""

    item: str
    answer: str
    anchor: str = ""


def checklist(found: Evaluation) -> list[Item]:
    """Return the checklist of https://arxiv.org/abs/1902.06705, section 4, answered; what was not done is said."""
    record, verdict = found.record, found.verdict
    attacks, model = record["attacks"], record["threat_model"]
    kinds = {kind: [name for name, attack in attacks.items() if attack["kind"] == kind] for kind in KINDS}
    checks = {check.name: check for check in found.checks}
    flags = {flag.name: flag for flag in found.flags}

    def said(name: str) -> str:
        check = checks.get(name)
        return "not tested here" if check is None else f"{'passed' if check.passed else 'FAILED'}: {check.detail}"

    def listed(kind: str) -> str:
        return ", ".join(kinds[kind]) or "none"

    draws = [name for name in attacks if "eot" in name]
    seeds = record["seeds"]["report"]
    n = verdict.n
    return [
        Item(
            "Do not mindlessly follow the list",
            "What the attacks are, and why, stands below; read the failed checks first.",
        ),
        Item(
            "Precise threat model",
            f"Perturbations of at most {model['eps']:.4g} in {model['norm']} within the inputs' range; the goal is any "
            "wrong label; the attacker knows the model, the data and the defence's code and settings, but not its "
            "random draws.",
        ),
        Item(
            "Adaptive attacks, the strongest for the defence",
            f"Attacks that know the defence: {listed('adaptive')}.",
            "attacks",
        ),
        Item(
            "Pre-trained models and source code",
            "The code is this package, and the command and commit at the foot of the page repeat the run; "
            "`immunonet predict` classifies with the defence.",
            "settings",
        ),
        Item("Clean accuracy", _accuracy(found, "none"), "attacks"),
        Item("Iterative attacks beat single steps", said("many steps are at least as strong as one"), "checks"),
        Item(
            "Larger budgets give more success, up to guessing",
            said("accuracy falls to chance as eps grows, without rising"),
            "curves",
        ),
        Item("Success against budget", "Drawn below, up to the whole range of inputs.", "curves"),
        Item(
            "Adaptive attacks do better than any other, per example",
            said("transfer is no stronger than attacks that know"),
            "checks",
        ),
        Item(
            "All attacks described, with hyper-parameters", "In the JSON beside this page, under `attacks`.", "attacks"
        ),
        Item(
            "A diverse set of attacks",
            f"{len(attacks) - 1}: {', '.join(name for name in attacks if name != 'none')}.",
        ),
        Item(
            "A gradient-free and a hard-label attack",
            f"{listed('black box')}; {said('asking alone is no stronger than gradients')}",
            "checks",
        ),
        Item("Transfer from a similar model", f"{listed('transfer')}.", "attacks"),
        Item(
            "Randomness: ensemble over it",
            f"Candidates are chosen on {len(record['seeds']['selection'])} draws and counted on {len(seeds)} others; "
            f"expectation over transformations: {', '.join(draws) or 'not in this protocol'}; a known seed: "
            f"{'square-known-seed' if 'square-known-seed' in attacks else 'not tested'}."
            if seeds
            else "The defence is not random.",
        ),
        Item(
            "Non-differentiable parts: differentiable techniques",
            "BPDA and surrogates: "
            f"{', '.join(a for a in kinds['adaptive'] if not a.startswith('direct')) or 'none needed'}.",
        ),
        Item("Attacks have converged", said("twice the iterations change nothing beyond the interval"), "losses"),
        Item(
            "Hyper-parameters investigated",
            f"Zero gradients: {flags['zero gradients'].detail}. Steps and restarts are the protocol's; no search over "
            "them was made.",
            "checks",
        ),
        Item("Prior work", "Deep k-nearest neighbours (DkNN) is measured by the same command; see docs/robustness.md."),
        Item("Broader threat models", "Not tested: rotations, translations, common corruptions."),
        Item("Provable approaches", "None is known for this defence: all figures are upper bounds of robustness."),
        Item(
            "Random noise of the same norm",
            f"{attacks['noise']['calls']} draws on {attacks['noise']['attempted']} images; 10,000 are asked for.",
        ),
        Item(
            "Targeted and untargeted",
            "Untargeted; targeted by APGD's targeted DLR loss."
            if any("targeted" in a for a in attacks)
            else "Untargeted only.",
        ),
        Item(
            "Ablations",
            "Without crossover, mutation, selection, generations: below."
            if found.ablations
            else "Not in this run; the undefended network is attacked beside the defence.",
            "ablations" if found.ablations else "",
        ),
        Item(
            "New attacks validated",
            "The tests of this package compare every attack with a closed form or another library.",
        ),
        Item("Other domains than images", "The defence takes any inputs; this run is about one data set."),
        Item(
            "Per-example worst case", f"The verdict is the mean over {n} images of the worst attack on each.", "verdict"
        ),
    ]


KINDS = ("none", "transfer", "adaptive", "black box")


def _accuracy(found: Evaluation, attack: str) -> str:
    rows = [row for row in found.rows if row.attack == attack]
    return "; ".join(f"{row.defence} {row.accuracy:.3f}" for row in rows)
