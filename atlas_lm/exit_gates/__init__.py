"""Judge a run by the exit gates of its phase, and lock the chunk sizes that it is judged by.

python -m atlas_lm gates phase2 run=stage1        # G2-1 to G2-7
python -m atlas_lm gates phase4 run=stage2        # G4-1 to G4-6
python -m atlas_lm gates chunk_sizes model=tiny   # measure throughput and record the decision that G2-1 reads

What the run has recorded is read, what its newest checkpoint can do is measured now, in float32 whatever it was trained
in. No gate passes because something is missing.
"""
