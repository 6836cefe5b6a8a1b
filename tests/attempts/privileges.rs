//! At the kernel itself: what only the machine's root may ask of it. Each asks for something that changes nothing.

use crate::outcome::{Outcome, Step};
use crate::sys;

/// The outcome of a call whose refusal for another reason than a missing right shows that the right is there.
fn refused_otherwise(what: &str, result: std::io::Result<()>) -> Outcome {
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS)) => Err(e).step(what),
        other => Ok(format!("{what}: {}", other.map_or_else(|e| e.to_string(), |()| "done".into()))),
    }
}

/// Loading a module.
pub fn load_module() -> Outcome {
    refused_otherwise("init_module", sys::load_module())
}

/// Loading another kernel.
pub fn load_kernel() -> Outcome {
    refused_otherwise("kexec_load", sys::load_kernel())
}

/// Restarting the machine, or only what it takes for one.
pub fn reboot() -> Outcome {
    refused_otherwise("reboot", sys::reboot_wrongly())
}

/// Setting the clock.
pub fn set_clock() -> Outcome {
    sys::set_clock_status().step("adjtimex")?;
    Ok("set the clock's status".into())
}

/// Running a program in the kernel.
pub fn load_bpf() -> Outcome {
    sys::load_bpf_tracer().step("bpf")?;
    Ok("loaded a program that traces".into())
}

/// Counting what all processes do.
pub fn watch_processors() -> Outcome {
    sys::count_events_of_all().step("perf_event_open")?;
    Ok("counts events of all processes".into())
}

/// Being handed every file that is opened on the file system.
pub fn watch_file_system() -> Outcome {
    sys::watch_file_system(c"/").step("fanotify")?;
    Ok("is handed all files that are opened".into())
}

/// Changing the network.
pub fn change_network() -> Outcome {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket can be opened");
    sys::loopback_flags(&socket, false).expect("flags can be read");
    sys::loopback_flags(&socket, true).step("set flags of lo")?;
    Ok("set flags of lo".into())
}

/// Giving the kernel work by a ring, of which no filter of system calls hears.
pub fn ring() -> Outcome {
    sys::ring().step("io_uring_setup")?;
    Ok("has a ring".into())
}

/// Holding the kernel up whenever it touches this process's memory.
pub fn page_fault_handler() -> Outcome {
    sys::page_fault_handler().step("userfaultfd")?;
    Ok("handles its page faults itself".into())
}

/// Reading the kernel's log.
pub fn read_kernel_log() -> Outcome {
    let read = sys::read_kernel_log().step("syslog")?;
    Ok(format!("read {read} bytes of the kernel's log"))
}
