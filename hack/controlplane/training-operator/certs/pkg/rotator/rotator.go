// Package rotator stands in for the certificate rotator that the training
// operator links. The original waits until a kubelet has mounted its Secret
// below a fixed path in /tmp. Here no kubelet exists, and several control planes
// may run on one machine, so the certificate comes from the folder named by
// FINETUNE_WEBHOOK_CERT_DIR, and the webhook listens on the loopback address only.
//
// It offers no more than what the training operator's pkg/cert uses.
package rotator

import (
	"context"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
)

const certDirVariable = "FINETUNE_WEBHOOK_CERT_DIR"

// WebhookType says which kind of resource carries the certificate authority.
type WebhookType int

// Validating marks a ValidatingWebhookConfiguration.
const Validating WebhookType = iota

// WebhookInfo names a resource that the original rotator would write the
// certificate authority into. Whoever starts this operator does that instead.
type WebhookInfo struct {
	Name string
	Type WebhookType
}

// CertRotator has the fields that the training operator sets. Only IsReady is used.
type CertRotator struct {
	SecretKey             types.NamespacedName
	CertDir               string
	CAName                string
	CAOrganization        string
	DNSName               string
	IsReady               chan struct{}
	Webhooks              []WebhookInfo
	RequireLeaderElection bool
}

// AddRotator points the manager's webhook server at the certificate that lies
// ready, and reports readiness as soon as the manager runs.
func AddRotator(mgr manager.Manager, rotator *CertRotator) error {
	dir := os.Getenv(certDirVariable)
	if dir == "" {
		return fmt.Errorf("environment variable %s is empty: set it to the folder that holds tls.crt and tls.key", certDirVariable)
	}
	server, ok := mgr.GetWebhookServer().(*webhook.DefaultServer)
	if !ok {
		return fmt.Errorf("webhook server is a %T, not a *webhook.DefaultServer: adapt this package to the new controller-runtime", mgr.GetWebhookServer())
	}
	server.Options.Host = "127.0.0.1"
	server.Options.CertDir = dir
	return mgr.Add(rotator)
}

// Start reports readiness until the manager stops. It sends instead of closing
// the channel, because the training operator closes it too when it ends, and
// closing it twice panics.
func (r *CertRotator) Start(ctx context.Context) error {
	for {
		select {
		case r.IsReady <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
	}
}

// NeedLeaderElection is false: every replica serves the webhook.
func (r *CertRotator) NeedLeaderElection() bool { return false }
