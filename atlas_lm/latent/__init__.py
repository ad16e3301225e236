"""Next-vector prediction: from the embeddings of five passages of a text to that of the next one; a leaf.

frames.py      documents as vectors, one a frame: read, checked, split by document
embed.py       from text to such a folder, with any sentence-transformers model
audit.py       what is wrong with them before anything is trained
source.py      the batches
model.py       frames → the next frame; losses.py what it learns from; module.py trains it
metrics.py     cosine, retrieval, collapse; five_cat.py the five tests; baselines.py the rows beside the model
"""
