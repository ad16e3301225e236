"""What a language model does while it generates; a leaf.

capture.py      from the raw rows of some steps to scalars, and the columns that grow
atlas.py        our models: hooks and the loop; window.py the weights of their attention, memory.py their fast weights
hugging_face.py other models, in their own `generate`; layers.py where their layers are
metrics.py      every figure as a function of tensors; repetition.py loops
summary.py      one number for each thing measured; health.py flags and thresholds, calibrate.py fits these to a model
report.py       trace → report; schema.py the report, page.py as HTML, exported.py as named numbers, sinks.py sends them
subject.py      a model with its tokenizer; training.py one that trains
dashboard/      reports and runs in a browser; serve.py starts it
"""
