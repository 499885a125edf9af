"""What is wrong with an adapter: by its names, config and numbers, for engines, beside others.

A check is a function from an adapter (as `read_adapter` describes it), or from the figures of one
pass over its tensors, to findings. Modules hold the checks of one subject and list them in CHECKS;
`findings` holds the table of all codes.
"""
