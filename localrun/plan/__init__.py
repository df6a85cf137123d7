"""Will a model fit, how fast will it be, and why: arithmetic over tensor sizes and a description of the machine.

shapes: models by file, config.json or name. machine: what a machine has, each rate with its source. memory: what goes
where. decode: time a token. tables: KV cache and training costs. cluster, topology, flows: beyond one machine.
"""
