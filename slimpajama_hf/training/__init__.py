"""The loop: one document per step, measured, recorded and saved, in one process or several."""
