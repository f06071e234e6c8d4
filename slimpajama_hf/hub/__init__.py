"""A run and the Hub: every checkpoint goes up beside training, and a run comes back down on another machine.

Before step 0, `account` asks whether the token may write. Training (`background`) puts hard links of each checkpoint
into the `outbox`. A separate process (`upload_process`) prepares the newest one (`staging`, `model_card`) and commits
it, and tries again while the Hub fails. `push` does the same in the foreground, and `fetch` brings a run back.
docs/hub.md has the layout.
"""
