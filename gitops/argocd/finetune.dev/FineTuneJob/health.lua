-- Health of a FineTuneJob. Argo CD runs this without Lua's string and math libraries: nothing here needs them.

-- Training takes hours, and a later sync wave waits until this says Healthy. Where it should not wait, set this to
-- true: a job is then Healthy once the operator has accepted and planned it, and Degraded if it fails all the same.
local accepted_is_healthy = false

local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is(name, value)
  return conditions[name] ~= nil and conditions[name].status == value
end

-- What the operator says of a condition: its reason, and its message where there is one.
local function why(name)
  local condition = conditions[name] or {}
  local reason, message = condition.reason or name, condition.message or ""
  if message == "" then
    return reason
  end
  return reason .. ": " .. message
end

if status.observedGeneration == nil then
  return { status = "Progressing", message = "Waiting for the operator" }
end
if status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "Waiting for the operator to take note of the changed spec" }
end
if is("Failed", "True") then
  return { status = "Degraded", message = why("Failed") }
end
if is("Succeeded", "True") then
  return { status = "Healthy", message = why("Succeeded") }
end
if is("Suspended", "True") then
  return { status = "Suspended", message = why("Suspended") }
end
-- One that was refused or does not fit has failed: what was planned and gets this far was accepted.
if accepted_is_healthy and conditions.Planned ~= nil then
  return { status = "Healthy", message = "Accepted; " .. why("Reconciling") }
end
return { status = "Progressing", message = why("Reconciling") }
