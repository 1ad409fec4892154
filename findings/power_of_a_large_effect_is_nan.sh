#!/usr/bin/env bash
# statsmodels 0.15.0 on scipy 1.17.1: the power of a paired t-test with 16 pairs is NaN for an effect of 3 or 5 standard
# deviations, and 1 for one of 2, 4 or 6.
# Guess: power rises with the effect, and 1 is its limit.
# What happens: the chance of the wrong tail, which is below 1e-27, comes out of scipy's noncentral t distribution as NaN
# for some values, and TTestPower adds it. Tables of power have holes, and a search for the number of pairs meets them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet scipy==1.17.1 statsmodels==0.15.0
"$work/venv/bin/python" - <<'PYTHON'
import math

import scipy
import statsmodels
from scipy.special import nctdtr
from statsmodels.stats.power import TTestPower

print(f"statsmodels {statsmodels.__version__}, scipy {scipy.__version__}")
pairs, effects = 16, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
power = [float(TTestPower().power(effect, pairs, 0.05)) for effect in effects]
print(f"{pairs} pairs, level 0.05, effects in standard deviations:")
for effect, found in zip(effects, power, strict=True):
    print(f"  effect {effect:g}: guessed {'1' if effect > 1 else 'below 1'}, found {found:.6g}")
tail = nctdtr(pairs - 1, 3.0 * math.sqrt(pairs), -2.1314)
print(f"the wrong tail at effect 3: nctdtr gives {tail}")
holes = [effect for effect, found in zip(effects, power, strict=True) if math.isnan(found)]
assert 3.0 in holes, holes
assert power[0] < 1, power
assert power[3] == 1, power
assert math.isnan(tail), tail
PYTHON
echo "still so"
