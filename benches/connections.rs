//! `ssh host true` over an existing connection, and over new ones.

use testbed::Environment;

use crate::environments::{close_all, three_ways};
use crate::measure::{differences, in_turns};
use crate::report::BarChart;
use crate::{Bound, Report, Unit};

pub fn connections(runs: usize, report: &mut Report) {
    let environments = three_ways();
    let masters = environments.each_ref().map(|(_, environment)| environment.master());
    let mut commands = masters.each_ref().map(|master| {
        let mut command = master.ssh();
        command.arg("true");
        command
    });
    let warm = in_turns(runs * 10, commands.each_mut());
    drop(masters);
    let mut commands = environments.each_ref().map(|(_, environment): &(_, Environment)| {
        let mut command = environment.ssh(&[]);
        command.arg("true");
        command
    });
    let new = in_turns(runs * 3, commands.each_mut());
    let mut bars = Vec::new();
    for (kind, samples, bound) in
        [("an existing connection", warm, Bound::Limit(2.0)), ("a new connection", new, Bound::Information)]
    {
        for ((name, _), samples) in environments.iter().zip(&samples) {
            report.add(&format!("{kind}, {name}"), Unit::Milliseconds, samples.clone(), Bound::Information);
            bars.push((format!("{kind}, {name}"), samples.clone()));
        }
        let [jailed, plain, chroot] = &samples;
        report.add(&format!("{kind}, jailed − plain"), Unit::Milliseconds, differences(jailed, plain), bound);
        let more = differences(jailed, chroot);
        report.add(&format!("{kind}, jailed − ChrootDirectory"), Unit::Milliseconds, more, Bound::Information);
    }
    report.note(
        "A plain login runs one program, the container's shell; a login to a jail runs two, `ims-jail-shell` \
         and the image's shell.",
    );
    report.bars(BarChart {
        file: "connections",
        title: "ssh host true",
        axis: "milliseconds, median and quartiles (logarithmic)",
        bars,
    });
    close_all(environments);
}
