"""The dashboard: pages that show jobs and build manifests, and the server that they talk to. It changes nothing.

`static/` is the front end: plain ES modules that run in the browser as they stand. All else is the server: `server`
answers requests, `access` says who may see what, `views` makes what is sent, `memory` keeps a job's curves within
bounds, `checking` and `form` are behind the form. Jobs come from a `source`: the operator's store, a folder of runs, or
an API server that is asked with a user's own rights.
"""
