"""Compare with the packages that are installed here: python -m tests.harness.stand_ins."""

from tests.harness.stand_ins.drift import signature_drift

for compared, drift in signature_drift():
    print(f"{compared}: {drift or 'the same'}")
