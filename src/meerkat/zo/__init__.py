"""Zeroth-order arithmetic that client, server and replay share bit for bit; numpy alone, no torch.

Reading order: `noise` draws z, `directions` names it, `state` is what a run trains; `estimators`
turn losses into coefficients, `update_rules` these into the next state, and `log` keeps them.
"""
