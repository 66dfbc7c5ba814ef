"""Of qat.py: arms, workers, peers, costs and their page."""
