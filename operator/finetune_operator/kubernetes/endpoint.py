"""Where the replica that leads is reached: an EndpointSlice of a Service that has no selector.

Only the leader takes in progress. Behind a selector a Service would send a part of all reports to replicas that wait;
a readiness probe that fails on those would keep the Deployment from ever being available.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import create_namespaced_resource

from finetune_operator import constants as c
from finetune_operator.settings import Settings
from finetune_operator.tasks import first_to_end

Services = create_namespaced_resource("", "v1", "Service", "services")
EndpointSlices = create_namespaced_resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """This replica behind the Service."""

    namespace: str
    service: str
    address: str
    """IP of this replica's pod."""
    port: int
    port_name: str = "progress"
    """As in the Service."""

    def manifest(self, service_uid: str) -> dict[str, Any]:
        """The EndpointSlice; the Service owns it, so that it goes with the Service."""
        owner = {"apiVersion": "v1", "kind": "Service", "name": self.service, "uid": service_uid}
        family = ipaddress.ip_address(self.address).version
        return {
            "metadata": {
                # The family of a slice cannot change.
                "name": f"{self.service}-ipv{family}",
                "namespace": self.namespace,
                "labels": {
                    "kubernetes.io/service-name": self.service,
                    "endpointslice.kubernetes.io/managed-by": c.MANAGED_BY,
                },
                "ownerReferences": [owner],
            },
            "addressType": f"IPv{family}",
            "endpoints": [{"addresses": [self.address], "conditions": {"ready": True}}],
            "ports": [{"name": self.port_name, "port": self.port, "protocol": "TCP"}],
        }


class LeaderEndpoint:
    """Points the Service to this replica."""

    def __init__(self, client: AsyncClient, endpoint: Endpoint) -> None:
        self._client: Any = client  # lightkube's overloads leave generic resources out
        self._endpoint = endpoint

    async def keep(self, seconds: float) -> None:
        """Look every so many seconds whether the Service leads here, and see to it. For ever; a failure is logged, and
        tried again soon: jobs do not depend on their progress being seen."""
        while True:
            try:
                await self._ensure()
                await asyncio.sleep(seconds)
            except httpx.HTTPError as error:
                name = f"{self._endpoint.namespace}/{self._endpoint.service}"
                log.warning("service %s does not lead to this replica yet", name, extra={"cause": str(error)})
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _ensure(self) -> None:
        namespace = self._endpoint.namespace
        service = await self._client.get(Services, self._endpoint.service, namespace=namespace)
        wanted = self._endpoint.manifest(service["metadata"]["uid"])
        name = wanted["metadata"]["name"]
        try:
            found = await self._client.get(EndpointSlices, name, namespace=namespace)
        except ApiError as error:
            if error.status.code != 404:
                raise
            await self._client.create(EndpointSlices.from_dict(wanted), namespace=namespace)
            return
        if wanted["endpoints"] != found.get("endpoints") or wanted["ports"] != found.get("ports"):
            found["endpoints"], found["ports"] = wanted["endpoints"], wanted["ports"]
            await self._client.replace(found)


async def lead_services(client: AsyncClient, settings: Settings) -> None:
    """Lead the Services of the progress server and of the dashboard to this replica. For ever."""
    services = (
        (settings.progress_service, settings.progress_port, "progress"),
        (settings.dashboard.service, settings.dashboard.port, "dashboard"),
    )
    here = (
        Endpoint(settings.namespace, service, str(settings.address), port, name)
        for service, port, name in services
        if service is not None and port is not None
    )
    led = (LeaderEndpoint(client, one).keep(settings.resync_seconds) for one in here)
    await first_to_end(asyncio.Event().wait(), *led)
