"""The verdict: what a team agreed on, two runs side by side, and what the gate makes of them."""
