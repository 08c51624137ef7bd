#!/bin/bash
# The reward is 0 until check.py has seen it all: what it cannot make sense of is an attempt that failed.
mkdir -p /logs/verifier
echo '{"reward": 0.0}' > /logs/verifier/reward.json
python3 /tests/check.py
