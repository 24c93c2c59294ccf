-- An action is offered where it does something: none on a job that is being deleted or has succeeded, retry on one
-- that has failed, and of suspend and resume the one that changes the spec.
local actions = {}

local conditions = {}
for _, condition in ipairs((obj.status or {}).conditions or {}) do
  conditions[condition.type] = condition.status
end

if obj.metadata.deletionTimestamp ~= nil or conditions.Succeeded == "True" then
  return actions
end

if conditions.Failed == "True" then
  local asked = (obj.metadata.annotations or {})["finetune.dev/retry"]
  -- Asked already, by this action: the operator has yet to see it.
  if asked ~= obj.status.completionTime then
    actions["retry"] = { ["displayName"] = "Try once more", ["iconClass"] = "fa fa-fw fa-redo" }
  end
  return actions
end

if (obj.spec.runPolicy or {}).suspend then
  actions["resume"] = { ["displayName"] = "Resume", ["iconClass"] = "fa fa-fw fa-play" }
else
  actions["suspend"] = { ["displayName"] = "Suspend, with a checkpoint", ["iconClass"] = "fa fa-fw fa-pause" }
end
return actions
