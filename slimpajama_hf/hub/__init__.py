"""A run and the Hub: every checkpoint goes up beside training, and a run comes back down on another machine.

`account` asks before step 0 whether the token may write. Training (`background`) lays hard links of each checkpoint
into `outbox`; a process of its own (`upload_process`) makes of the newest one what goes up (`staging`,
`model_card`) and commits it, again and again while the Hub fails. `push` does that in the
foreground, `fetch` is the way back. docs/hub.md has the layout.
"""
