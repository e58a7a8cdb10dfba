"""Ways to divide the work. Read context (named axes), comm (collectives), sharding
(which part of a parameter a rank holds), tensor_parallel; shared_heads is one of its layers, held
by several ranks alike, and replicated is for the parameters of others' layers.

vocab_parallel cuts embedding, head and loss; data_parallel sums gradients while others are made;
zero/ lets ranks of dp hold a slice each; pipeline/ divides the layers; overlap hides a collective
behind a product. dropout and recompute hold in every layout, and replicas compares what ranks hold
alike.
"""
