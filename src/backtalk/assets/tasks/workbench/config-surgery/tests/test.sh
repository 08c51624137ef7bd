#!/bin/bash
# Always leaves a reward: whatever check.py cannot make sense of is an attempt that failed, which is 0.
mkdir -p /logs/verifier
python3 /tests/check.py || echo 0 > /logs/verifier/reward.txt
