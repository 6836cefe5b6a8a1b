//! Operations reserved for the machine's root. Each is requested in a way that changes nothing.

use crate::outcome::{Outcome, Step};
use crate::sys;

/// Outcome of a call that fails either way: any error other than a missing privilege shows that the privilege is there.
fn refused_otherwise(what: &str, result: std::io::Result<()>) -> Outcome {
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS)) => Err(e).step(what),
        other => Ok(format!("{what}: {}", other.map_or_else(|e| e.to_string(), |()| "done".into()))),
    }
}

/// Loads a module.
pub fn load_module() -> Outcome {
    refused_otherwise("init_module", sys::load_module())
}

/// Loads another kernel.
pub fn load_kernel() -> Outcome {
    refused_otherwise("kexec_load", sys::load_kernel())
}

/// Restarts the machine, or what the namespace takes for it.
pub fn reboot() -> Outcome {
    refused_otherwise("reboot", sys::reboot_wrongly())
}

/// Sets the clock.
pub fn set_clock() -> Outcome {
    sys::set_clock_status().step("adjtimex")?;
    Ok("set the clock's status".into())
}

/// Loads a BPF program.
pub fn load_bpf() -> Outcome {
    sys::load_bpf_tracer().step("bpf")?;
    Ok("loaded a program that traces".into())
}

/// Counts events of all processes.
pub fn watch_processors() -> Outcome {
    sys::count_events_of_all().step("perf_event_open")?;
    Ok("counts events of all processes".into())
}

/// Receives every file opened on the file system (fanotify).
pub fn watch_file_system() -> Outcome {
    sys::watch_file_system(c"/").step("fanotify")?;
    Ok("is handed all files that are opened".into())
}

/// Changes the network.
pub fn change_network() -> Outcome {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket can be opened");
    sys::loopback_flags(&socket, false).expect("flags can be read");
    sys::loopback_flags(&socket, true).step("set flags of lo")?;
    Ok("set flags of lo".into())
}

/// Uses io_uring, whose operations bypass seccomp filters.
pub fn ring() -> Outcome {
    sys::ring().step("io_uring_setup")?;
    Ok("has a ring".into())
}

/// Suspends the kernel whenever it accesses this process's memory (userfaultfd).
pub fn page_fault_handler() -> Outcome {
    sys::page_fault_handler().step("userfaultfd")?;
    Ok("handles its page faults itself".into())
}

/// Reads the kernel log.
pub fn read_kernel_log() -> Outcome {
    let read = sys::read_kernel_log().step("syslog")?;
    Ok(format!("read {read} bytes of the kernel's log"))
}
