"""The standing attack suite, `make attack`: hostile files, bundles and hubs, kills and flipped bits.

    python -m tests.attack --seconds 300 --seed 1 --out benchmarks/results/attack.json

Every attempt ends in one of these ways, and the last three must stay at zero:

    refused   an error of the project that names the culprit
    served    what was asked for, bit for bit
    crashed   any other exception, or the end of the process
    wrong     something else than what was saved, or more memory or time than a refusal may take
    lost      what was there before is no longer whole
"""
