"""Argo CD's Lua: its interpreter (5.1), what it lets a script reach, and what it makes of the answer.

After `util/lua/lua.go` and `util/lua/oslib_safe.go` of Argo CD: a script of `argocd-cm` gets the base and table
libraries and an `os` of time and date behind `require`; string, math, io, debug and coroutine are not opened, so
strings have no methods either. We hand out less: nothing that loads code or files.
"""

from __future__ import annotations

from typing import Any

from lupa.lua51 import LuaRuntime, lua_type

HEALTHY, PROGRESSING, DEGRADED, SUSPENDED = "Healthy", "Progressing", "Degraded", "Suspended"
HEALTH = {HEALTHY, PROGRESSING, DEGRADED, SUSPENDED, "Missing", "Unknown"}

_SANDBOX = """
local safe_os = { time = os.time, date = os.date }
local base = {
  assert = assert, error = error, getmetatable = getmetatable, ipairs = ipairs, next = next, pairs = pairs,
  pcall = pcall, rawequal = rawequal, rawget = rawget, rawset = rawset, select = select, setmetatable = setmetatable,
  tonumber = tonumber, tostring = tostring, type = type, unpack = unpack, xpcall = xpcall, table = table,
  require = function(name) assert(name == "os", "module not found: " .. name) return safe_os end,
}
getmetatable("").__index = nil
local compile, bind, fail = loadstring, setfenv, error
return function(script, obj)
  local chunk, problem = compile(script)
  if chunk == nil then fail(problem) end
  base.obj = obj
  return bind(chunk, base)()
end
"""


def run(script: str, obj: Any) -> Any:
    """What a script returns for an object, as JSON would have it.

    Raises:
        lupa.lua51.LuaError: the script does not compile, or fails.
    """
    lua = LuaRuntime(register_eval=False, unpack_returned_tuples=True)
    answer = lua.execute(_SANDBOX)(script, _to_lua(lua, obj))
    assert lua_type(answer) == "table", f"expect table output from Lua script, not {lua_type(answer)}"
    return _from_lua(answer)


def health(script: str, obj: dict[str, Any]) -> tuple[str, str]:
    """Status and message."""
    answer = run(script, obj)
    assert answer["status"] in HEALTH, "Lua returned an invalid health status"
    assert set(answer) <= {"status", "message"}
    return answer["status"], answer.get("message", "")


def discover(script: str, obj: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The actions that are offered, by name, each as an action test lists it."""
    answer = run(script, obj)
    # An empty table is an empty list to Argo CD, too.
    found = {} if answer == [] else answer
    return {name: {"name": name, "disabled": False, **values} for name, values in found.items()}


def act(script: str, obj: dict[str, Any]) -> dict[str, Any]:
    """The object that Argo CD writes back."""
    changed = _cleaned(run(script, obj), obj)
    assert isinstance(changed, dict)
    return changed


def _to_lua(lua: LuaRuntime, value: Any) -> Any:
    if isinstance(value, dict):
        return lua.table_from({key: _to_lua(lua, one) for key, one in value.items()})
    if isinstance(value, list):
        return lua.table_from([_to_lua(lua, one) for one in value])
    return value


def _from_lua(value: Any) -> Any:
    if lua_type(value) == "table":
        keys = list(value.keys())
        if all(isinstance(key, str) for key in keys) and keys:
            return {key: _from_lua(value[key]) for key in keys}
        assert sorted(keys) == list(range(1, len(keys) + 1)), f"neither a map nor a list: {keys}"
        return [_from_lua(value[key]) for key in sorted(keys)]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _cleaned(new: Any, old: Any) -> Any:
    """As `cleanReturnedObj`: an empty map comes back from Lua as an empty list, and is what it was before."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _cleaned(one, old.get(key)) for key, one in new.items()}
    if isinstance(new, list) and isinstance(old, list):
        return [_cleaned(one, old[at]) if at < len(old) else one for at, one in enumerate(new)]
    return old if new == [] and isinstance(old, dict) else new
