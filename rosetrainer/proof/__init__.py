"""Whether a layout computes what one process does, and what it is held against.

reference, reference_rotary, reference_llama, reference_bert, reference_t5, reference_glm and
reference_transformer_xl are the dense oracles, plain nn.Linear and no layer of ours, and oracles
says which computes a model; batches are uneven and random; trajectory makes the same few updates in
a layout and by the oracle, tolerances says how far the results may differ, letters which tensor is
the first that is wrong, and report shows it; pretrained is a proof on a checkpoint's weights.

module does the same for any module beside its dense twin, by the passes of module_results.
"""
