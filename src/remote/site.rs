//! Copies the settings of the pod's sshd to the sshd on a build node. Of the settings that cannot take effect there,
//! those that restrict access or features are refused, and the others cause a warning.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::environment::settings::Settings;
use crate::error::{Error, Result};
use crate::sshd::accept_env;
use crate::sshd::effective::Effective;
use crate::sshd::public_keys;

/// Keywords whose values the node's sshd gets from the pod's sshd; it gets no others. Every supported version of sshd
/// knows these keywords, except for the last three. An sshd that does not know one of the three exits with an error
/// that names it.
const CARRIED: [&str; 44] = [
    "acceptenv",
    "allowagentforwarding",
    "allowgroups",
    "allowstreamlocalforwarding",
    "allowtcpforwarding",
    "allowusers",
    "authenticationmethods",
    "ciphers",
    "clientalivecountmax",
    "clientaliveinterval",
    "compression",
    "denygroups",
    "denyusers",
    "disableforwarding",
    "forcecommand",
    "gatewayports",
    "hostkeyalgorithms",
    "ipqos",
    "kexalgorithms",
    "logingracetime",
    "macs",
    "maxauthtries",
    "maxsessions",
    "maxstartups",
    "permitlisten",
    "permitopen",
    "permitrootlogin",
    "permittty",
    "permittunnel",
    "permituserenvironment",
    "permituserrc",
    "printlastlog",
    "printmotd",
    "pubkeyacceptedalgorithms",
    "pubkeyauthentication",
    "pubkeyauthoptions",
    "rekeylimit",
    "streamlocalbindmask",
    "streamlocalbindunlink",
    "tcpkeepalive",
    "x11forwarding",
    "channeltimeout",
    "requiredrsasize",
    "unusedconnectiontimeout",
];

/// Keywords that are not copied, without a warning: they are used in the pod, the environment's sshd has its own value
/// for them, or they concern logs or files that the node's sshd itself has.
const ELSEWHERE: [&str; 17] = [
    "addressfamily",
    "authorizedkeysfile",
    "exposeauthinfo",
    "hostkey",
    "hostkeyagent",
    "kbdinteractiveauthentication",
    "listenaddress",
    "loglevel",
    "logverbose",
    "passwordauthentication",
    "pidfile",
    "port",
    "setenv",
    "strictmodes",
    "subsystem",
    "syslogfacility",
    "xauthlocation",
];

/// Returns the lines of the pod's sshd configuration that the node's sshd gets.
pub(super) fn carried(sshd: &Effective, settings: &Settings, keys: &str) -> Result<Vec<(String, String)>> {
    let jailed = settings.job.jailed;
    for (keyword, shown) in [("allowusers", "AllowUsers"), ("denyusers", "DenyUsers")] {
        if let Some(words) = sshd.all(keyword).find(|words| words.contains('@')) {
            return Err(refused(&format!("{shown} {words}"), ONE_ADDRESS));
        }
    }
    if let Some(block) = accept_env::match_by_address(&settings.sshd_config, &settings.sshd)? {
        return Err(refused(&block, ONE_ADDRESS));
    }
    if let Some(line) = keys.lines().find(|line| public_keys::has_option(line, "from")) {
        let end = line.split_whitespace().next_back().unwrap_or_default();
        return Err(refused(&format!("from= of the public key '{end}'"), ONE_ADDRESS));
    }
    let is_off = |keyword: &str, off: &str| sshd.first(keyword).is_none_or(|value| value.eq_ignore_ascii_case(off));
    if !is_off("revokedkeys", "none") {
        return Err(refused("RevokedKeys", "the file is the pod's"));
    }
    if !jailed && !is_off("chrootdirectory", "none") {
        return Err(refused("ChrootDirectory", "the directory is the pod's"));
    }
    if !is_off("pubkeyauthentication", "yes") {
        return Err(refused("PubkeyAuthentication no", "only public keys are accepted there"));
    }
    let methods = sshd.first("authenticationmethods").unwrap_or("any");
    if !methods.split_whitespace().any(|method| ["any", "publickey"].contains(&method)) {
        let what = format!("AuthenticationMethods {methods}");
        return Err(refused(&what, "only public keys are accepted there"));
    }
    let own = Effective::ask(&["-f".into(), "/dev/null".into()], "root")?;
    let own: BTreeSet<_> = own.lines().collect();
    let mut lines = Vec::new();
    for (keyword, value) in sshd.lines() {
        let is_used_elsewhere = ELSEWHERE.contains(&keyword) || jailed && keyword == "chrootdirectory";
        if keyword == "subsystem" {
            lines.extend(sftp(value).map(|value| (keyword.to_owned(), value)));
        } else if own.contains(&(keyword, value)) {
            // The default needs no line.
        } else if CARRIED.contains(&keyword) {
            lines.push((keyword.to_owned(), value.to_owned()));
        } else if !is_used_elsewhere {
            let line = format!("{keyword} {value}");
            tracing::warn!("sshd's '{line}' has no effect on a build node: it applies only to the pod");
        }
    }
    Ok(lines)
}

/// Reason why settings that depend on a client's address or host name cannot take effect on a node.
const ONE_ADDRESS: &str = "every client has the address 127.0.0.1 there";

fn refused(what: &str, why: &str) -> Error {
    Error::bad_input(format!(
        "cannot open the environment on a build node: {what} of sshd's configuration has no effect there, since {why}; \
         remove it for jobs with REMOTE_BUILD_NODE, or restrict the pod's port by a NetworkPolicy"
    ))
}

/// Returns the subsystem for file transfers, changed to use sshd's internal server. Returns `None` for other
/// subsystems, which are programs of the pod.
fn sftp(value: &str) -> Option<String> {
    let (name, command) = value.split_once(' ')?;
    let (server, options) = command.split_once(' ').unwrap_or((command, ""));
    if name == "sftp" && (server == "internal-sftp" || server.ends_with("/sftp-server")) {
        return Some(format!("sftp internal-sftp {options}").trim_end().to_owned());
    }
    tracing::warn!("sshd's 'Subsystem {value}' has no effect on a build node: its program is in the pod");
    None
}

/// Returns the lines as text for sshd's configuration on the node. The near side chose the lines, so unknown keywords
/// are refused.
pub(super) fn lines(carried: &[(String, String)]) -> Result<String> {
    let mut text = String::new();
    for (keyword, value) in carried {
        let is_known = keyword == "subsystem" || CARRIED.contains(&keyword.as_str());
        if !is_known || value.chars().any(char::is_control) {
            return Err(Error::new("write sshd's configuration").because(format!("a node does not accept '{keyword}'")));
        }
        text.extend([keyword, " ", value, "\n"]);
    }
    // The keys and lines are meant for root, so do not let other accounts of the node log in.
    text.push_str("Match User *,!root\n    DenyUsers *\n");
    Ok(text)
}

/// Returns the addresses and ports on which the pod's sshd would listen; `None` as an address means all addresses.
pub(super) fn listen(sshd: &Effective) -> Result<Vec<(Option<IpAddr>, u16)>> {
    let parse = |text: &str| {
        let wrong = || Error::bad_input(format!("cannot listen on ListenAddress {text}: it is no address of this pod"));
        text.parse::<SocketAddr>().map_err(|_| wrong())
    };
    let addresses = sshd.all("listenaddress").map(parse).collect::<Result<Vec<_>>>()?;
    let has_all = |port: u16| {
        let all = |is_ipv6: bool| {
            addresses.iter().any(|a| a.port() == port && a.ip().is_unspecified() && a.is_ipv6() == is_ipv6)
        };
        all(false) && all(true)
    };
    let mut listen = Vec::new();
    for address in &addresses {
        let here = if has_all(address.port()) { (None, address.port()) } else { (Some(address.ip()), address.port()) };
        if !listen.contains(&here) {
            listen.push(here);
        }
    }
    Ok(if listen.is_empty() { vec![(None, 22)] } else { listen })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_configuration_are_those_of_the_pods_port() {
        let listen = |text: &str| listen(&Effective::parse(text.as_bytes())).unwrap();
        let local = |port| (Some("127.0.0.1".parse().unwrap()), port);
        assert_eq!(listen("listenaddress [::]:22\nlistenaddress 0.0.0.0:22\n"), [(None, 22)]);
        assert_eq!(listen("listenaddress 0.0.0.0:22\n"), [(Some("0.0.0.0".parse().unwrap()), 22)]);
        assert_eq!(listen("listenaddress 127.0.0.1:22\nlistenaddress 127.0.0.1:23\n"), [local(22), local(23)]);
        assert!(super::listen(&Effective::parse(b"listenaddress 192.0.2.1:22 rdomain x\n")).is_err());
    }

    #[test]
    fn nothing_but_known_lines_is_written_on_a_node() {
        let line = |keyword: &str, value: &str| lines(&[(keyword.into(), value.into())]);
        assert!(line("permittty", "no").unwrap().starts_with("permittty no\nMatch "));
        assert!(line("permittty", "no\nHostKey /x").is_err());
        for keyword in ["hostkey", "include", "match", "authorizedkeyscommand", "banner"] {
            assert!(line(keyword, "x").is_err(), "{keyword}");
        }
    }

    #[test]
    fn file_transfers_are_those_of_sshd_itself() {
        assert_eq!(sftp("sftp /usr/lib/ssh/sftp-server -R").unwrap(), "sftp internal-sftp -R");
        assert_eq!(sftp("sftp internal-sftp").unwrap(), "sftp internal-sftp");
        assert_eq!(sftp("netconf /usr/bin/netconf"), None);
    }
}
