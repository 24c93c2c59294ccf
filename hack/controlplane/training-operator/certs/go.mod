// Built only as a part of ../go.mod, which pins what it needs.
module github.com/open-policy-agent/cert-controller

go 1.26.0

require (
	k8s.io/apimachinery v0.36.3
	sigs.k8s.io/controller-runtime v0.24.1
)
