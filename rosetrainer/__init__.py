"""A small GPT trainer in which every parallel layout computes what one process does.

Folders are floors: a folder imports only from those below it.

    commands > proof > training > reporting > checkpoint, planner > models, optim > parallel
             > hardware, launch, data > config

At the bottom, beside config: run_config, validation, environment, cgroup, durable_files, heartbeat,
model_choices, model_size and model_flops.
"""
