"""Commands that measure accuracy and judge it."""

from __future__ import annotations

from compare.commands import Group, called
from compare.inputs import write_runs

_ASK = "--include nano/tasks --tasks nano_brackets,nano_choice --limit 300 --batch-size 64"
_TEXT = "--text nano/tasks/nano.txt --lines --tokens 512"
_DRIFT = f"eval fidelity nano/k2 nano/k2-int4 {_TEXT}"

_EVAL = {
    "plan": "eval plan",
    "plan-flips": "eval plan --margin 2pp --power 0.9 --alpha 0.01 --flips 4% --drop 0.5pp",
    "plan-json": "eval plan --json --drop 1.5pp --margin 3pp",
    "plan-pilot": "eval plan --pilot eval/given/good/base eval/given/good/candidate",
    "presets": "eval run --list-presets",
    "run": f"eval run nano/k2 {_ASK} -o eval/runs/k2",
    "run-int4": f"eval run nano/k2-int4 {_ASK} -o eval/runs/int4 --json",
    "run-again": f"eval run nano/k2 {_ASK} -o eval/runs/k2",
    "fidelity": f"{_DRIFT} -o eval/fidelity.json",
    "fidelity-json": f"eval fidelity nano/k2 nano/k2-fp8 {_TEXT} --json --dtype float32 --backend reference",
    "blame": f"eval blame nano/k2 nano/k2-int4 {_TEXT} --passes 12 -o eval/blame.json",
    "gate": "eval gate eval/runs/k2 eval/runs/int4 --tasks nano_choice --margin 5pp -o eval/gate-real "
    "--fidelity eval/fidelity.json --blame eval/blame.json",
    "gate-chance": "eval gate eval/runs/k2 eval/runs/int4",
    "gate-same": "eval gate eval/runs/k2 eval/runs/k2 --tasks nano_choice",
    **{
        f"gate-{kind}": f"eval gate eval/given/{kind}/base eval/given/{kind}/candidate -o eval/gate-{kind}"
        for kind in ("good", "bad", "unsure")
    },
    "gate-json": "eval gate eval/given/bad/base eval/given/bad/candidate --json --margin 3pp --alpha 1%",
    "gate-policy": "eval gate eval/given/unsure/base eval/given/unsure/candidate --policy eval/policy.yaml",
    "gate-noise": "eval gate eval/given/good/base eval/given/good/candidate --aa -o eval/gate-noise",
    "gate-github": "eval gate eval/given/bad/base eval/given/bad/candidate --github",
    "gate-margin": "eval gate eval/given/good/base eval/given/good/candidate --margin 120pp",
    "gate-task": "eval gate eval/given/good/base eval/given/good/candidate --tasks nonsense",
    "gate-missing": "eval gate eval/given/good/base eval/missing",
    "no-model": "eval run nano/missing --tasks k2-quick -o eval/runs/never",
    "no-server": "eval run some-model --backend api --tasks gsm8k -o eval/runs/never",
    "two-shares": "eval plan --flips 4% --pilot eval/given/good/base eval/given/good/candidate",
}

GROUPS = (Group(name="eval", commands=tuple(called(_EVAL)), needs=("nano",), prepare=write_runs),)
