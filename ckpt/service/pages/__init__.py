"""The pages of the service: made on the server, with a little script and nothing from elsewhere.

They show what the API shows, and what the roots' hints tell (:mod:`ckpt.timeline`,
:mod:`ckpt.handoff.replica_record`). Whatever a root says is text: templates escape it, links are
made from checked names alone, and the browser is told to run no script but the one served here.
"""
