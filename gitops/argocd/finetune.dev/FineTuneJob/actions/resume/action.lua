obj.spec.runPolicy = obj.spec.runPolicy or {}
obj.spec.runPolicy.suspend = false
return obj
